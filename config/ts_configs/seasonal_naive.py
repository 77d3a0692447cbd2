# The last day over and over: what a forecast of ETTh1 must beat. Nothing is trained.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/seasonal_naive.py
# Test mse 0.5122, mae 0.4333, in a second or two.

out_dir = "out/ts_seasonal_naive"
forecaster = "seasonal_naive"
