# 3.2 M parameters on the books as bytes; a step is 32 x 128 = 4,096 bytes, 600 steps are 2.5 M.
dataset = "books_bytes"
device = "cpu"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 128
batch_size = 32
gradient_accumulation_steps = 1

lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 30
max_iters = 600

eval_interval = 100
eval_iters = 30  # 123 k bytes of the validation split
log_interval = 25
