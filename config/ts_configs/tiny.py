# Forecasting ETTh1's next 96 hours from the last 96 on a laptop's CPU: standard attention, or MLR attention on top.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/tiny.py
#   python train_TS.py config/ts_configs/tiny.py config/ts_configs/mlr.py --out_dir=out/ts_tiny_mlr
# 15 to 50 s each on one CPU thread. Zero, where the output starts, costs val mse 1.50, test mse 1.11. At steps 100,
# 200, 300, the range of seeds 1337 and 1 on one thread and on two, and of an earlier machine:
#   standard  val mse 0.96-1.01, 0.84-1.03, 0.84-1.02   test mse 0.56-0.80, 0.50-0.75, 0.52-0.77
#   MLR       val mse 1.08-1.15, 0.81-0.93, 0.87-0.99   test mse 0.77-0.85, 0.55-0.70, 0.55-0.79
# The months after the training part differ from it, and nothing here corrects for that, so rounding, seeds and steps
# differ by more than structures do.

out_dir = "out/ts_tiny"
d_model = 64
n_head = 1
max_iters = 300
init_lr = 2e-3
log_interval = 50
