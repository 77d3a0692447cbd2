# The last hour over and over: what a forecast of ETTh1 must beat. Nothing is trained.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/repeat_last.py
# Test mse 1.2944, mae 0.7132, in a second or two; DLinear's paper has 1.295 and 0.713.

out_dir = "out/ts_repeat_last"
forecaster = "repeat_last"
