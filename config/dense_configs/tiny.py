# Shakespeare on a laptop's CPU, nanoGPT's CPU settings.
#   python data/shakespeare_char/prepare.py
#   python train.py config/dense_configs/tiny.py
# Expect a validation loss of 1.82 after 2,000 steps (nanoGPT: 1.88), 3 minutes on one core.

dataset = "shakespeare_char"
out_dir = "out/tiny_dense"
n_layer = 4
n_head = 4
d_model = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
init_lr = 1e-3
warmup_iters = 100
decay_lr = True
lr_decay_iters = 2_000
min_lr = 1e-4
max_iters = 2_000
beta2 = 0.99
eval_interval = 250
eval_iters = 8
log_interval = 100
