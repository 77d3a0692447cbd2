# A language model of Python's own documentation and sources on a laptop's CPU: standard attention, or one of the
# structures on top.
#   python data/pydocs/prepare.py
#   python train.py config/struct_configs/tiny.py
#   python train.py config/struct_configs/tiny.py config/struct_configs/tiny_mlr.py
# Expect a validation loss of 2.37 to 2.48 over six runs; 60 s on one core.

dataset = "pydocs"
out_dir = "out/tiny"
n_layer = 3
d_model = 64
d_head = 32
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
warmup_iters = 100
max_iters = 600
eval_interval = 100
eval_iters = 5
log_interval = 20
