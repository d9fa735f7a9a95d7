# GPT-2 124 M on WikiText-103 by the plain recipe, AdamW on a cosine. config/wikitext103.py is measured against it.
#     python train.py config/wikitext103_adamw.py
#     torchrun --nproc_per_node=8 train.py config/wikitext103_adamw.py
#
# A step is 16 x 8 = 128 sequences x 1,024 tokens = 131,072 tokens, in the largest micro-batches that fit. The processes
# share the sequences, so their number has to divide 128.
# An epoch is 117.9 M tokens and an end-of-text for each page: about 115,200 blocks of 1,024, which is 900 steps.
# 20 epochs are 18,000 steps and 2.36 billion tokens. A token takes 0.855 GFLOP, all of them 2.0e18 FLOP. By arithmetic
# that is 4.5 hours at 40 % of an A100's dense bfloat16 peak of 312 TFLOP/s, or 1.4 hours at 40 % of an H100's 989.
#
# The text is small for the model. Hence the dropout, and best.pt is the checkpoint to report.
out_dir = "out/wikitext103_adamw"
dataset = "wikitext103"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.1

auto_batch_size = True
batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 180  # 1 % of the steps
max_epochs = 20

eval_interval = 450  # twice an epoch, over the whole validation split
log_interval = 10
wandb_project = "wikitext103"
