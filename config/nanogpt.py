# nanoGPT's defaults and parametrization, for a config file of nanoGPT's to come after; its names n_embd and
# learning_rate are understood, too.
#   python train.py config/nanogpt.py --dataset=shakespeare_char
#   python train.py config/nanogpt.py path/to/nanoGPT/config/train_shakespeare_char.py
# On a laptop's CPU, 4 layers of 128, 2,000 steps (data/shakespeare_char/readme.md has the command), expect a validation
# loss of 1.88, as nanoGPT's README.
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
