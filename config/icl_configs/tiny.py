# The paper's in-context linear regression at a laptop's size: 4 dimensions, d_model 16, eight heads of width 2;
# standard attention, or a bilinear structure on top.
#   python train_ICL.py config/icl_configs/tiny.py
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_mlr.py
# Predicting zero costs 1.09 on these evaluation prompts. After 3,500 steps, 100 s on one core, two seeds are at 1.08
# and 1.09 with standard attention, 0.67 and 1.09 with BTT, 0.74 and 0.84 with MLR. A smoke test, not evidence: when a
# run leaves the plateau of predicting zero is luck at this size, and one head as wide as the model stays there as well
# (--n_head=1: 1.09 and 1.09). recall.py is a task on which the width of a head decides.

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
