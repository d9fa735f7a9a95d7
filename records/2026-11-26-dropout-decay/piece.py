# Ten times over the 1.8 million bytes of data/books_little, with 1.8 M parameters.
dataset = "books_little"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1

optimizer = "muon"
momentum = 0.9
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 55
max_iters = 1100

eval_interval = 110  # an epoch
eval_iters = 30  # 492 k bytes of the validation split
log_interval = 45
seed = 1
