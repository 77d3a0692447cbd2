# Noisy recall in context on a laptop's CPU: 32 pairs (x, y) with x on the unit sphere of R^16, and a query near one of
# the x, whose y is asked for. Not the paper's prompt, which is linear regression (paper.py): chosen because at this
# size and in this time it shows what a head narrower than the input cannot do.
# Expect an error of 0.73 to 0.75 over three seeds (zero 1.00, averaging 0.73, nearest neighbour 0.01), 0.04 to 0.06 of
# one head of 32, which is the control; 40 s on one core.
#   python train_ICL.py config/icl_configs/recall.py
#   python train_ICL.py config/icl_configs/recall.py --n_head=1 --out_dir=out/recall_one_head
#   python train_ICL.py config/icl_configs/recall.py config/icl_configs/recall_btt.py
#   python train_ICL.py config/icl_configs/recall.py config/icl_configs/recall_mlr.py

out_dir = "out/recall"
training_task = "noisy_recall"
n_positions = 33  # 32 pairs and the query
d_model = 32
n_layer = 1
batch_size = 32
max_iters = 4_000
training_learning_rate = 1e-4
warmup_iters = 100
eval_interval = 200
eval_prompts = 4_096
eval_batch_size = 256
log_interval = 200
