# The demo: a model of 0.8 M parameters learns to write Python from the standard library's own source, byte by byte.
#     python train.py config/demo.py
# A step is 16 x 128 = 2,048 bytes. 1,500 steps are 3.1 M of the 11.6 M bytes that there are: minutes on two CPU cores.
out_dir = "out/demo"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

# Small models take high rates, few tokens a quick cool-down to almost nothing.
learning_rate = 5e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 1500

eval_interval = 250
eval_iters = 20  # 41 k bytes of the validation split
log_interval = 50
