# A GPT-2 of 51 M parameters on WikiText-103, for one GPU of 8 GB.
#     python train.py config/wikitext103_small.py
#
# A step is 16 x 8 = 128 sequences x 512 tokens = 65,536 tokens. An epoch of 117.9 M tokens is 1,800 steps.
# 10 epochs are 18,000 steps and 1.18 billion tokens. For 10 epochs of one parameter a token no dropout was best with
# small models (records/2026-11-26-dropout-decay). Here it is 0.4 parameters a token.
#
# The micro-batches are the largest that fit, by arithmetic 32 sequences in 8 GB. Weights, gradients and two moments in
# float32 take 16 bytes x 51 M = 0.8 GB. A token's activations take 34 bytes x 8 layers x 512 channels, those of 32
# sequences 2.3 GB. Their logits take 1.6 GB.
out_dir = "out/wikitext103_small"
dataset = "wikitext103"

n_layer = 8
n_head = 8
n_embd = 512
block_size = 512
dropout = 0.0

auto_batch_size = True
batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 8e-4
min_lr = 8e-5
warmup_iters = 180  # 1 % of the steps
max_epochs = 10

eval_interval = 900  # twice an epoch
log_interval = 10
wandb_project = "wikitext103"
