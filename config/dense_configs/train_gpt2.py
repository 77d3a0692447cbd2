# GPT-2 (124M) on OpenWebText, nanoGPT's settings in this project's parametrization.
#   python data/openwebtext/prepare.py
#   python train.py config/dense_configs/train_gpt2.py
# Expect a validation loss near 3.3 at 50,000 steps and 2.85 at 600,000 (nanoGPT's, on 8 A100s in 4 days; not run here).

dataset = "openwebtext"
out_dir = "out/gpt2"
n_layer = 12
n_head = 12
batch_size = 12
gradient_accumulation_steps = 40
init_lr = 6e-4
decay_lr = True
lr_decay_iters = 600_000
min_lr = 6e-5
max_iters = 600_000
weight_decay = 0.1
dtype = "bfloat16"
compile = True
