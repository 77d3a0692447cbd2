# The paper's language models: characters of OpenWebText, 6 layers, heads of width 64, T 1024, 100,000 steps.
#   python data/openwebtext_small/prepare.py
#   python train.py config/struct_configs/train_struct_gpt2.py --d_model=256
#   python train.py config/struct_configs/train_struct_gpt2.py config/struct_configs/mlr.py --d_model=256
# The defaults of train.py are the paper's; this file adds where it runs. The best rate for standard attention is 3e-3,
# the default, at d_model 256 and 384, and 1.65e-3 at 512 and 768. Without a second file: standard attention; the files
# beside this one name the other structures and their rates.
# Expect validation losses of 0.9 to 1.03 nats a character after 100,000 steps on OpenWebText (the paper's figure); on
# other English, at d_model 256, 1.13 to 1.16 after 10,000 steps, 1.10 to 1.12 with MLR (results/README.md). On one H200
# the 100,000 steps take 21 minutes at d_model 256, 22 with MLR; as one micro-batch, which is the same batch
# (--batch_size=32 --gradient_accumulation_steps=1), 10 and 11.

out_dir = "out/struct_gpt2"
dtype = "bfloat16"
compile = True
