dataset = "books_piece"
n_layer, n_head, n_embd, block_size = 2, 2, 128, 128
batch_size, gradient_accumulation_steps = 16, 1
max_epochs, warmup_iters, min_lr = 5, 60, 0.0
lr_schedule = "linear"
optimizer, learning_rate, momentum = "muon", 8e-3, 0.9
eval_interval, eval_iters, log_interval = 122, 60, 61
device, save_interval = "cpu", 0
