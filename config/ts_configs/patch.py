# PatchTST's layout on ETTh1 at its paper's size: 336 hours read as 42 patches, 3 layers of width 16, 4 heads of 4, scores
# q . k / sqrt(4). The rate is that of the read-in; µP gives the hidden matrices 48 times as much. PatchTST's own, 1e-4
# for everything over 100 epochs, gets there more slowly; here the rate halves every epoch after the second.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/patch.py
# Test mse at 96 hours, seed 1, where val was lowest up to steps 64, 128, 192, 256: 0.400, 0.385, 0.382, 0.380
# (published: 0.375). 10 minutes on one CPU thread. With MLR attention or a window: scripts/time_series/sweep.py
# --grid=patch.

out_dir = "out/ts_patch"
forecaster = "patch"
instance_norm = True
look_back = 336
n_layer = 3
d_model = 16
n_head = 4
do_qk_ln = False
mha_SP_attn_logits_scaling = True
dropout = 0.3
bias = True
batch_size = 128
max_iters = 512
lr_schedule = "type1"
eval_interval = 64
