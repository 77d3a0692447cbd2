# PatchTST's layout on ETTh1 at the published size and rate: 336 hours read as 42 patches, 3 layers of width 16, 4 heads
# of 4, scores q . k / sqrt(4), 1e-4 for every weight. By µP hidden matrices this narrow would learn 48 times as fast as
# at width 768: the model then overfits within 4 epochs, at 336 hours before it is any good.
#   python data/ett/prepare.py
#   python train_TS.py config/ts_configs/patch.py
# An epoch is 64 steps. 15 minutes on one CPU thread. With MLR attention or a window, and further ahead:
# scripts/time_series/sweep.py --grid=patch.

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
init_lr = 1e-4
one_rate = True
beta2 = 0.999
max_iters = 1_024
lr_schedule = "type3"
eval_interval = 64
