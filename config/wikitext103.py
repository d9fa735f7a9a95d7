# GPT-2 124 M from scratch on WikiText-103.
#     python train.py config/wikitext103.py
#     torchrun --nproc_per_node=8 train.py config/wikitext103.py
#
# A step: 16 micro-batches x 8 sequences x 1,024 tokens = 131,072 tokens, on any number of processes that divides 16.
# An epoch: 117.9 M tokens and an end-of-text a page are about 115,200 blocks of 1,024, which is 900 steps.
# 10 epochs: 9,000 steps, 1.18 billion tokens, half of what config/wikitext103_adamw.py takes. At 0.855 GFLOP a token
# that is 1.0e18 FLOP: by arithmetic 2.2 hours at 40 % of an A100's dense bfloat16 peak of 312 TFLOP/s, 0.7 hours at
# 40 % of an H100's 989.
# The text is small for the model, a token a parameter: dropout, and best.pt is the checkpoint to report. Of the smaller
# models in records/ those with that share were the worse for it, by 0.06 to 0.14, and one with a quarter of the tokens
# the better, though less than for a weight_decay of 0.5. 0.1 is near the published recipe's, which has it on embeddings
# and attention alone, for up to 100 epochs; 0 is to be measured beside it here.
out_dir = "out/wikitext103"
dataset = "wikitext103"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.1

batch_size = 8  # by arithmetic about 10 GB; --batch_size=32 --gradient_accumulation_steps=4 is the same training
gradient_accumulation_steps = 16

# records/ has the measurements, of 1.8 M and 3.2 M parameters; at this size they are yet to be made.
optimizer = "muon"  # there, at a momentum of 0.9, 0.45 of AdamW's steps ended lower and level; 0.95 is for long runs
learning_rate = 1.8e-3  # there the best rate tried was three to four times AdamW's, which is 6e-4 here
lr_schedule = "linear"  # to 0, as there
min_lr = 0.0
warmup_iters = 180  # 2 %
max_epochs = 10

eval_interval = 450  # twice an epoch, over the whole validation split
log_interval = 10
wandb_project = "wikitext103"
