# ALiBi in place of learned position vectors, a control of the paper's language models: on top of train_struct_gpt2.py.
#   python train.py config/struct_configs/train_struct_gpt2.py config/struct_configs/alibi.py --d_model=256
# With mlr.py in between the same for MLR attention, into a folder of its own: --out_dir=out/struct_gpt2_mlr_alibi

out_dir = "out/struct_gpt2_alibi"
position = "alibi"
