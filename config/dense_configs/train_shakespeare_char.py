# A character model of Shakespeare, nanoGPT's GPU settings.
#   python data/shakespeare_char/prepare.py
#   python train.py config/dense_configs/train_shakespeare_char.py
# Expect a best validation loss near 1.47 within 2,000 of 5,000 steps (nanoGPT's; minutes on one GPU), then overfitting.

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char"
n_head = 6
d_model = 384
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1
dropout = 0.2
init_lr = 1e-3
warmup_iters = 100
decay_lr = True
lr_decay_iters = 5_000
min_lr = 1e-4
max_iters = 5_000
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
always_save_checkpoint = False  # it overfits: keep the best
