# DLinear on ETTh1 with the settings of its paper: 336 hours read, two linear maps, 10 epochs of Adam, batches of 32.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/dlinear.py
# An epoch is 256 steps. At horizon 192 it is 253 (--horizon=192 --max_iters=2530 --eval_interval=253), at 336 249
# (--horizon=336 --max_iters=2490 --eval_interval=249). Half a minute each on one CPU thread.
# Test mse, median of 5 seeds: 0.372, 0.419, 0.443 (published 0.375, 0.405, 0.439). Luck may choose an early epoch:
# with --patience=0 it is 0.372, 0.412, 0.436, and all seeds end near 0.370, 0.404, 0.434 (results/time_series).

out_dir = "out/ts_dlinear"
forecaster = "dlinear"
look_back = 336
max_iters = 2_560
init_lr = 5e-3
warmup_iters = 0
lr_schedule = "type1"
eval_interval = 256
patience = 3
beta2 = 0.999
grad_clip = 0.0
log_interval = 256
