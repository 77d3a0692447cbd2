# Alternating standard and sliding-window layers in the paper's language models: on top of train_struct_gpt2.py.
#   python train.py config/struct_configs/train_struct_gpt2.py config/struct_configs/sequential_gswa.py --d_model=256

out_dir = "out/struct_gpt2_sequential_gswa"
token_mixing_struct = "low_rank_with_sequential_gswa"
