# The paper's in-context linear regression: prompts of 2 n_dims pairs, 6 layers, 8 heads, float32, 500,000 steps,
# a pool of 32,000,064 prompts. A structure on top, of which standard.py is the paper's standard attention:
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/standard.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_btt.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_mlr.py --n_dims=16 --d_model=128
# The curriculum is planned for 500,000 steps whatever --max_iters is, so a shorter run is a prefix of the paper's.
# The paper's best rates are mostly 1e-4 and 5e-5. On one H100 at n_dims 16, d_model 128: 395 steps/s for standard
# attention, 236 for bilinear BTT, 212 for bilinear MLR, so 20 to 40 minutes. What to expect: results/README.md.

out_dir = "out/icl"
compile = True
training_learning_rate = 1e-4
training_num_training_examples = 32_000_064
training_curriculum_steps = 500_000
log_interval = 100
