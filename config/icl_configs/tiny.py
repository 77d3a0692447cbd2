# In-context regression on a laptop's CPU where the heads (width 2) are narrower than the input (4 dimensions):
# standard attention, or a bilinear structure on top.
#   python train_ICL.py config/icl_configs/tiny.py
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_mlr.py
# Predicting zero costs 1.09 on these evaluation prompts. Expect 1.09 from standard attention after 3,500 steps, and
# 0.69 to 0.85 (BTT) and 0.65 to 0.85 (MLR) over six runs; 100 s each on one core.

out_dir = "out/icl_tiny"
n_dims = 4
d_model = 16
n_layer = 2
max_iters = 3_500
training_learning_rate = 4e-3
warmup_iters = 100
eval_interval = 250
eval_prompts = 1_024
eval_batch_size = 256
log_interval = 250
