# A small Chronos T5 from random weights on a laptop's CPU: 96 hours of a channel of ETTh1 read, 24 predicted, T5's own
# self-attention, or MLR attention in its place.
#   pip install -r requirements-chronos.txt
#   python data/ett/prepare.py
#   python train_chronos.py config/ts_configs/chronos_tiny.py
#   python train_chronos.py config/ts_configs/chronos_tiny.py config/ts_configs/mlr.py --out_dir=out/ts_chronos_mlr
# Two minutes each on one CPU thread, half of it forecasts. Loss 6.2 at the start, 5.8, 4.4, 3.7, 3.6 nats a token up to
# steps 50, 100, 200, 300. Then, seeds 1337 and 2, 16 test windows of 7 channels, wql the mean weighted quantile loss:
#   standard                test mse 0.70, 0.81   mae 0.52, 0.63   wql 0.58, 0.68
#   MLR, no weighting       test mse 0.71, 0.71   mae 0.53, 0.52   wql 0.58, 0.57
#   MLR, shared (mlr.py)    test mse 0.72, 0.80   mae 0.53, 0.59   wql 0.58, 0.62
# Seeds differ by as much as the structures: this shows that it runs and learns, nothing about which is better.

out_dir = "out/ts_chronos_tiny"
look_back = 96
horizon = 24
n_layer = 2
d_model = 64
d_head = 16
d_ff = 256
n_tokens = 512
dropout = 0.0
mlr_rank_list = "8|4|4"
max_iters = 300
init_lr = 1e-2
warmup_iters = 20
eval_interval = 100
eval_windows = 16
log_interval = 50
