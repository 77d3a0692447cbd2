# Bilinear MLR in the paper's in-context regression: on top of paper.py. The default ranks, 8|4|2|2,
# are for heads of width 16 (d_model 128).
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/bilinear_mlr.py --n_dims=16 --d_model=128

out_dir = "out/icl_bilinear_mlr"
token_mixing_struct = "bilinear_MLR"
