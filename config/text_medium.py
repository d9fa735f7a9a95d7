# A first model of a text of 1 to 20 megabytes, for a CPU or a small GPU.
#     python prepare_text.py BOOK.txt --dataset=book
#     python train.py config/text_medium.py --dataset=book --out_dir=out/book
#
# With GPT-2's ids the model has 12 M parameters, 9.6 M of them in the embedding. A step is 16 sequences x 256 = 4,096
# tokens. 600 steps are 2.5 M tokens, about 10 MB of English. Of a text of 5 MB that is two epochs. The run ends after
# three evaluations that are no better, and best.pt has the best.
#
# War and Peace, 3.2 MB, took 27 minutes on two cores of an AMD EPYC that had other work now and then. The validation
# loss was 5.149 at best, which is 1.56 bits per byte (2026-11-26).
out_dir = "out/text_medium"
dataset = "book"

n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1

optimizer = "muon"
momentum = 0.9
learning_rate = 6e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 30
max_iters = 600

eval_interval = 60
eval_iters = 20  # 82 k tokens of the validation split
patience = 3
log_interval = 10
sample_tokens = 40  # tokens after each evaluation, to watch it learn; a | stands before them
