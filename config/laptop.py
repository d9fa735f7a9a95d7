# A GPT-2 of 6.1 M parameters on books as bytes, for two hours of a laptop's two cores.
#     python prepare_text.py BOOKS --dataset=books_bytes --tokenizer=bytes
#     python train.py config/laptop.py
#
# A step is 64 sequences x 256 bytes = 16,384 bytes. 1,400 steps are 22.9 MB. Two cores of an AMD EPYC with AVX-512 took
# 4.9 seconds a step (2026-11-26, torch 2.13), which is 1.9 hours. Over 21.1 MB of books two seeds ended at 1.714 bits
# per byte of 13 other books, and at 2.642 of WikiText's test text, where nanoGPT had 1.903 and 2.863 after as many
# hours (records/2026-11-26-laptop, nanoGPT's of one seed, on a GPU and with a rate of 1e-3 alone).
out_dir = "out/laptop"
dataset = "books_bytes"

n_layer = 6
n_head = 9
n_embd = 288
block_size = 256

# A CPU takes the micro-batch that is fastest.
auto_batch_size = True
batch_size = 64
gradient_accumulation_steps = 1

# The rate is the best one at this size for 600 steps (records/2026-11-26-muon-changes).
optimizer = "muon"
momentum = 0.9
learning_rate = 16e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 70  # 5 % of the steps
max_iters = 1400

eval_interval = 350
eval_iters = 30  # 30 x 16,384 = 492 kB of the validation split
log_interval = 10
