# MLR attention in the paper's language models: on top of train_struct_gpt2.py.
#   python train.py config/struct_configs/train_struct_gpt2.py config/struct_configs/mlr.py --d_model=256
# The default ranks are the paper's. Its best rates: 3e-3 at d_model 256 and 512, 1.65e-2 at 384 and 768.

out_dir = "out/struct_gpt2_mlr"
token_mixing_struct = "multi_level_low_rank"
mlr_block_divide_by_num_levels = True
