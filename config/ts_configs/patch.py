# PatchTST's layout on ETTh1 at its paper's size: 336 hours read as 42 patches, 3 layers of width 16, 4 heads. Its rate,
# 1e-4 for everything, is here that of the read-in; µP gives the hidden matrices 48 times as much.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/patch.py
# Heads are 4 wide: MLR attention among the patches takes --token_mixing_struct=multi_level_low_rank with
# --mlr_rank_list="2|1|1", whose blocks are then 42, 22 and 11 patches.

out_dir = "out/ts_patch"
forecaster = "patch"
instance_norm = True
look_back = 336
n_layer = 3
d_model = 16
n_head = 4
dropout = 0.3
bias = True
batch_size = 128
init_lr = 1e-4
max_iters = 1_280
lr_schedule = "type3"
eval_interval = 64
patience = 10
