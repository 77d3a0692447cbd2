# Bilinear BTT at the size of tiny.py.
#   python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
# Expect an error of 0.69 to 0.85 after 7 examples, over six runs; 100 s on one core.

out_dir = "out/icl_tiny_bilinear_btt"
token_mixing_struct = "bilinear_BTT"
