# The demo: a model of 0.8 M parameters learns to write Python from the source of the standard library, byte by byte.
#     python train.py config/demo.py
#
# A step is 16 sequences x 128 bytes = 2,048 bytes. 1,000 steps are 2.0 M bytes of a corpus of about 10 M. They take
# minutes on two CPU cores.
out_dir = "out/demo"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

# In records/, at 1.8 M parameters on books, Muon needed 0.45 of AdamW's steps, with a higher rate and a momentum of
# 0.9.
optimizer = "muon"
momentum = 0.9
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1000

eval_interval = 50
eval_iters = 20  # 20 x 2,048 = 41 k bytes of the validation split
log_interval = 50
sample_tokens = 100  # bytes after each evaluation, to watch it learn; a | stands before them
