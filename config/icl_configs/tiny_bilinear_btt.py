# Bilinear BTT at the size of tiny.py.
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
# TINY_BTT

out_dir = "out/icl_tiny_bilinear_btt"
token_mixing_struct = "bilinear_BTT"
