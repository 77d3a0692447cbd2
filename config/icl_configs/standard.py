# Standard attention in the paper's in-context regression, whose scores have the scale 1/sqrt(r): on top of paper.py.
#   python train_ICL.py config/icl_configs/paper.py config/icl_configs/standard.py --n_dims=16 --d_model=128

out_dir = "out/icl_standard"
mha_SP_attn_logits_scaling = True
