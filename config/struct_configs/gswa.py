# Global + sliding-window attention in the paper's language models: on top of train_struct_gpt2.py.
#   python train.py config/struct_configs/train_struct_gpt2.py config/struct_configs/gswa.py --d_model=256
# The paper's best rates: 3e-3, and 1.65e-2 at d_model 768.

out_dir = "out/struct_gpt2_gswa"
token_mixing_struct = "low_rank_with_gswa"
