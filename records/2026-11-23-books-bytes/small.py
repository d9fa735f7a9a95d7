# 1.8 M parameters on the books as bytes; a step is 16 x 128 = 2,048 bytes, 1,200 steps are 2.5 M.
dataset = "books_bytes"
device = "cpu"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 60
max_iters = 1200

eval_interval = 150
eval_iters = 60  # 123 k bytes of the validation split
log_interval = 25
