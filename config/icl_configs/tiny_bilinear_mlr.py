# Bilinear MLR at the size of tiny.py: heads of width 2 put all of it into the third level, four
# chunks of the features with rank 2 each.
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_mlr.py
# Two seeds had errors of 0.74 and 0.84 after 7 examples; 100 s on one core.

out_dir = "out/icl_tiny_bilinear_mlr"
token_mixing_struct = "bilinear_MLR"
mlr_rank_list = "0|0|2"
