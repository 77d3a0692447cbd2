# Bilinear BTT in the paper's in-context regression: on top of paper.py.
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_btt.py --n_dims=16 --d_model=128

out_dir = "out/icl_bilinear_btt"
token_mixing_struct = "bilinear_BTT"
