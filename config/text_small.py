# A first model of a text of less than a megabyte, best as bytes: it learns to spell and to sound like the text.
#     python prepare_text.py NOTES --dataset=notes --tokenizer=bytes
#     python train.py config/text_small.py --dataset=notes --out_dir=out/notes
#
# The model has 0.8 M parameters. A step is 16 sequences x 128 bytes = 2,048 bytes. 1,000 steps are 2.0 M bytes, which
# read a text of a megabyte twice and one of 100 kilobytes twenty times. Small texts are learned by heart, so the run
# ends after three evaluations that are no better, and best.pt has the best.
#
# A novel of 785 kilobytes took 2 min 9 s on two cores of an AMD EPYC. The validation loss was 1.302, which is 1.88 bits
# per byte (2026-11-26).
out_dir = "out/text_small"
dataset = "notes"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

optimizer = "muon"
momentum = 0.9
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
max_iters = 1000

eval_interval = 100
patience = 3
log_interval = 50
sample_tokens = 100  # bytes after each evaluation, to watch it learn; a | stands before them
