# The demo: a model of 0.8 M parameters learns to write Python from the standard library's own source, byte by byte.
#     python train.py config/demo.py
# A step is 16 x 128 = 2,048 bytes. 1,000 steps are 2.0 M of about 10 M bytes that there are: minutes on two CPU cores.
out_dir = "out/demo"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

# records/: at 1.8 M parameters on books Muon took 0.45 of AdamW's steps, at a higher rate and with a shorter momentum.
optimizer = "muon"
momentum = 0.9
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1000

eval_interval = 250
eval_iters = 20  # 41 k bytes of the validation split
log_interval = 50
