# nanoGPT's defaults and parametrization. A config file of nanoGPT's, unchanged, comes after it:
# `python train.py config/nanogpt.py THEIRS.py`. With none, GPT-2 (124M) on OpenWebText:
#   python train.py config/nanogpt.py
# Expect a validation loss of 2.85 after 600,000 steps (nanoGPT's, on 8 A100s in 4 days; not run here).
# data/shakespeare_char/readme.md has a run of some minutes on a laptop's CPU.
import torch

dataset = "openwebtext"
n_layer = 12
n_head = 12
do_qk_ln = False
mup = False
tie_weights = True
batch_size = 12
gradient_accumulation_steps = 40
max_iters = 600_000
init_lr = 6e-4
decay_lr = True
lr_decay_iters = 600_000
min_lr = 6e-5
warmup_constant = False
weight_decay = 0.1
eval_interval = 2_000
log_interval = 1
wandb_project = "owt"
wandb_run_name = "gpt2"
if torch.cuda.is_available():
    dtype = "bfloat16"
    compile = True
