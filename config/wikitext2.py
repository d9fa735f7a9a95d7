# A GPT-2 of 7.2 M parameters on WikiText-2, a known benchmark, for a laptop without a GPU.
#     python train.py config/wikitext2.py
#     python eval.py config/wikitext2.py
#
# A step is 16 sequences x 256 tokens = 4,096 tokens. An epoch is 2.05 M words x 1.16 tokens a word = 2.4 M tokens,
# which is 580 steps. 4 epochs are 2,300 steps and 9.5 M tokens.
#
# The time is by arithmetic. A model of 30 M parameters, 6 layers x 384 channels, took 650 tokens/s on two CPU cores. A
# token takes 6 FLOP for each parameter. With a quarter of the parameters that is 2,700 tokens/s, and an hour for 9.5 M
# tokens.
#
# Of the parameters 6.4 M are the table of GPT-2's 50,257 ids. The other 0.8 M are 4 blocks of 12 x 128 x 128.
out_dir = "out/wikitext2"
dataset = "wikitext2"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1

# The optimizer, its momentum and its rate are those of config/demo.py, whose blocks have the same shape. They are not
# measured here.
optimizer = "muon"
momentum = 0.9
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 46  # 2 % of the steps
max_epochs = 4

eval_interval = 290  # twice an epoch, over the whole validation split
log_interval = 10
