# One pass of 16,384 bytes a step over data/books_slice, which records/parts.py makes.
dataset = "books_slice"

n_layer = 6
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1

lr_schedule = "linear"
min_lr = 0.0
eval_iters = 30  # 492 k bytes of the validation split
log_interval = 25
always_save_checkpoint = False
