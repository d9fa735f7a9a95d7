# GPT-2 124 M from scratch on WikiText-103.
#     python train.py config/wikitext103.py
#     torchrun --nproc_per_node=8 train.py config/wikitext103.py
#
# A step is 16 x 8 = 128 sequences x 1,024 tokens = 131,072 tokens. auto_batch_size splits them into the largest
# micro-batches that fit: by arithmetic 8 sequences on a card of 8 GB, 32 on one of 24 GB, all 128 on one of 80 GB. The
# processes share the sequences, so their number has to divide 128.
# An epoch is 117.9 M tokens and an end-of-text for each page: about 115,200 blocks of 1,024, which is 900 steps.
# 10 epochs are 9,000 steps and 1.18 billion tokens, half as many as config/wikitext103_adamw.py takes. A token takes
# 0.855 GFLOP, all of them 1.0e18 FLOP. By arithmetic that is 2.2 hours at 40 % of an A100's dense bfloat16 peak of
# 312 TFLOP/s. At the rate that steps of a model of this shape had on an H200, 551,000 tokens/s, it is 0.6 hours.
#
# The text is small for the model, a token for each parameter, and is read ten times. best.pt is the checkpoint to
# report. Of the models of 1.8 M parameters in records/2026-11-26-dropout-decay, with as many tokens for each, those
# without dropout ended lowest after 10 epochs, with a decay of which rate x decay x steps an epoch is 0.44. Here that
# is 2.4e-3 x 0.2 x 900. After 20 epochs dropout 0.1 ended lowest, and lower.
out_dir = "out/wikitext103"
dataset = "wikitext103"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0

auto_batch_size = True
batch_size = 8
gradient_accumulation_steps = 16

# The measurements in records/ are of models of up to 10.7 M parameters. Those at this size are still to be made. There
# Muon needed 0.4 of the steps to be level with AdamW. Its best rate was two to eight times AdamW's, which is 6e-4 here,
# without a clear fall with the width. This rate is in the middle, since long runs as a rule want lower ones.
# A momentum of 0.9 was better there, but the default, 0.95, is for long runs such as this one.
optimizer = "muon"
learning_rate = 2.4e-3
weight_decay = 0.2
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 180  # 2 % of the steps
max_epochs = 10

eval_interval = 450  # twice an epoch, over the whole validation split
log_interval = 10
wandb_project = "wikitext103"
