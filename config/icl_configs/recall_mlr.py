# Bilinear MLR with the narrow value heads of recall.py: rank 2 across two chunks of the features, 1 across four, 1
# across eight.
#   python train_ICL.py config/icl_configs/recall.py config/icl_configs/recall_mlr.py
# Expect an error of 0.16 to 0.22 over three seeds; 75 s on one core.

out_dir = "out/recall_mlr"
token_mixing_struct = "bilinear_MLR"
mlr_rank_list = "0|2|1|1"
