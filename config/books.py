# A GPT-2 of 30 M parameters on a shelf of books, 20 MB of text or more. It is small enough to learn on a CPU.
#     python prepare_text.py BOOKS/*.txt --dataset=books
#     python train.py config/books.py
#
# A step is 16 sequences x 256 tokens = 4,096 tokens. 2,000 steps are 8.2 M tokens, a tenth of an epoch over 319 MB of
# English.
#
# 97 books, 45 MB, took 11 seconds of steps on an H200, at 792,000 tokens/s. The validation loss on four others was
# 5.22, which is 1.98 bits per byte (2026-11-26). Two cores of an AMD EPYC take 4.7 seconds a step, which is 2.6 hours
# by arithmetic.
out_dir = "out/books"
dataset = "books"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000

eval_interval = 250
eval_iters = 20  # 20 x 4,096 = 82 k tokens of the validation split
log_interval = 10
