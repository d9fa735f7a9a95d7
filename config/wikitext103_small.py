# A GPT-2 of 51 M parameters on WikiText-103, for one GPU of 8 GB.
#     python train.py config/wikitext103_small.py
#
# A step: 16 micro-batches x 8 sequences x 512 tokens = 65,536 tokens. An epoch: 117.9 M tokens are 1,800 steps.
# Memory, by arithmetic: weights, gradients and two moments in float32 are 16 bytes x 51 M = 0.8 GB; the activations of
# a micro-batch of 4,096 tokens, about 60 bytes x 8 layers x 512 channels a token, 1 GB; the logits of a chunk of the
# loss and their gradients 2 GB.
# 10 epochs: 18,000 steps, 1.18 billion tokens.
out_dir = "out/wikitext103_small"
dataset = "wikitext103"

n_layer = 8
n_head = 8
n_embd = 512
block_size = 512
dropout = 0.1

batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 8e-4
min_lr = 8e-5
warmup_iters = 180
max_epochs = 10

eval_interval = 900  # twice an epoch
log_interval = 10
wandb_project = "wikitext103"
