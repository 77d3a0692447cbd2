# Bilinear BTT at the size of tiny.py.
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
# Two seeds had errors of 0.67 and 1.09 after 7 examples; 100 s on one core.

out_dir = "out/icl_tiny_bilinear_btt"
token_mixing_struct = "bilinear_BTT"
