# The plain recipe, AdamW on a cosine: what config/wikitext103.py is to be measured against.
#     python train.py config/wikitext103_adamw.py
#     torchrun --nproc_per_node=8 train.py config/wikitext103_adamw.py
#
# A step: 16 micro-batches x 8 sequences x 1,024 tokens = 131,072 tokens, on any number of processes that divides 16.
# An epoch: 117.9 M tokens and an end-of-text a page are about 115,200 blocks of 1,024, which is 900 steps.
# 20 epochs: 18,000 steps, 2.36 billion tokens. At 0.855 GFLOP a token that is 2.0e18 FLOP: by arithmetic 4.5 hours at
# 40 % of an A100's dense bfloat16 peak of 312 TFLOP/s, 1.4 hours at 40 % of an H100's 989.
# The text is small for the model: dropout, and best.pt is the checkpoint to report.
out_dir = "out/wikitext103_adamw"
dataset = "wikitext103"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.1

batch_size = 8  # by arithmetic about 10 GB; --batch_size=32 --gradient_accumulation_steps=4 is the same training
gradient_accumulation_steps = 16

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 180  # 1 %
max_epochs = 20

eval_interval = 450  # twice an epoch, over the whole validation split
log_interval = 10
wandb_project = "wikitext103"
