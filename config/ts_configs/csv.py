# A series of your own on a laptop's CPU: patches with MLR attention, every channel read by itself.
#   python data/csv/prepare.py --input sales.csv
#   python train_TS.py config/ts_configs/csv.py --dataset=sales
#   python forecast.py --out_dir=out/ts_csv
# 10 to 60 s on two CPU threads for a few channels. look_back and horizon must fit the series: scripts/own_series.py,
# which `make forecast CSV=sales.csv` runs, chooses such.

out_dir = "out/ts_csv"
data_dir = "data/csv"
forecaster = "patch"
instance_norm = True
token_mixing_struct = "multi_level_low_rank"
mlr_rank_list = "4|2|2"
mlr_block_divide_by_num_levels = True
d_model = 32
n_head = 4
dropout = 0.1
bias = True
max_iters = 300
init_lr = 1e-3
one_rate = True
log_interval = 50
