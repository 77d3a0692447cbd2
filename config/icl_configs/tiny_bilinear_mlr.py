# Bilinear MLR at the size of tiny.py: two levels, 2 and 4 chunks of the features, rank 6 in all.
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_mlr.py
# TINY_BMLR

out_dir = "out/icl_tiny_bilinear_mlr"
token_mixing_struct = "bilinear_MLR"
mlr_rank_list = "0|1|1"
