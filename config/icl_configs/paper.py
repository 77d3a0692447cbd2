# The paper's in-context linear regression: prompts of 2 n_dims pairs, 6 layers, 8 heads, float32, 500,000 steps.
#   python train_ICL.py config/icl_configs/paper.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_btt.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_mlr.py --n_dims=16 --d_model=128
# The defaults of train_ICL.py are the paper's; this file adds the curriculum. Without a second file: standard
# attention.
# On one H100 at n_dims 16, d_model 128: 395 steps/s for standard attention, 236 for bilinear BTT, 212 for bilinear MLR,
# so 20 to 40 minutes.

out_dir = "out/icl"
compile = True
training_curriculum_adaptive_inc = True
log_interval = 100
