# MLR attention at the size of tiny.py: eight levels, blocks of 256 down to 2.
#   python train.py config/struct_configs/tiny.py config/struct_configs/tiny_mlr.py
# Expect a validation loss of 2.24 to 2.29 over six runs; 120 s on one core.

out_dir = "out/tiny_mlr"
token_mixing_struct = "multi_level_low_rank"
mlr_rank_list = "8|4|4|4|4|4|2|2"
mlr_block_divide_by_num_levels = True
init_lr = 1e-2
