# The paper's in-context linear regression: prompts of 2 n_dims pairs, 6 layers, 8 heads, float32, 500,000 steps.
#   python train_ICL.py config/icl_configs/paper.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_btt.py --n_dims=16 --d_model=128
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_mlr.py --n_dims=16 --d_model=128
# The defaults of train_ICL.py are the paper's; this file adds the curriculum. Without a second file: standard
# attention.
# Standard attention has the scale 1/sqrt(r) in the paper's runs: --mha_SP_attn_logits_scaling=True. Their best rates
# are 1e-4 and 5e-5; at 3e-4 and above, n_dims 16 stays at an error of 0.5 to 0.8 for 45,000 steps.
# On one H100 at n_dims 16, d_model 128: 395 steps/s for standard attention, 236 for bilinear BTT, 212 for bilinear MLR,
# so 20 to 40 minutes. Error after 31 examples at 10,000 and 50,000 of 100,000 steps, rate 1e-4 (zero costs 0.97):
# standard 0.21 and 0.024 (at 5e-5 0.061 and 0.0071), BTT 0.018 and 0.0037, MLR 0.025 and 0.0045.

out_dir = "out/icl"
compile = True
training_learning_rate = 1e-4
training_curriculum_adaptive_inc = True
log_interval = 100
