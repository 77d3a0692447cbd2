# A small Chronos T5 from random weights: 256 hours of a channel of ETTh1 read, 64 predicted, a tenth of the training
# windows from KernelSynth; T5's own self-attention, or MLR attention of ranks 32|16|8|8 in encoder and decoder.
#   pip install -r requirements-chronos.txt
#   python data/ett/prepare.py
#   python train_chronos.py config/ts_configs/chronos.py
#   python train_chronos.py config/ts_configs/chronos.py config/ts_configs/mlr.py --out_dir=out/ts_chronos_mlr
# 8.4 M parameters. This wants a GPU: one CPU thread takes half a minute a step.

out_dir = "out/ts_chronos"
look_back = 256
max_iters = 1_000
warmup_iters = 50
eval_interval = 500
log_interval = 50
