# MLR attention in forecasting: on top of etth1.py or tiny.py. The default ranks, 32|16|8|8, are for heads of width 64;
# their blocks are 96, 48, 24 and 12 hours long. Any look_back will do: one of 100 has the blocks of 104, cut at 100.
#   python train_TS.py config/ts_configs/etth1.py config/ts_configs/mlr.py

out_dir = "out/ts_mlr"
token_mixing_struct = "multi_level_low_rank"
mlr_block_divide_by_num_levels = True
