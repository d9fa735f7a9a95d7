# demo
out_dir = "out/demo"
dataset = "stdlib"
batch_size = 16
block_size = 256
gradient_accumulation_steps = 1
n_layer = 4
n_head = 4
n_embd = 192
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
max_iters = 600
eval_interval = 100
eval_iters = 20
log_interval = 10
