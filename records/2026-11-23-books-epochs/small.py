dataset = "books_part"
n_layer, n_head, n_embd, block_size = 4, 4, 192, 128
batch_size, gradient_accumulation_steps = 32, 1
max_iters, warmup_iters, min_lr = 2440, 120, 0.0
lr_schedule = "linear"
optimizer, learning_rate, momentum = "muon", 8e-3, 0.9
eval_interval, eval_iters, log_interval = 244, 30, 61
device, save_interval = "cpu", 0
