# Fine-tune GPT-2's published weights on a text of one's own.
#     python prepare_text.py MY_FILES --dataset=mine
#     python train.py config/finetune.py --dataset=mine --out_dir=out/mine
#
# A step: 8 micro-batches x 4 sequences x 1,024 tokens = 32,768 tokens: a book of a megabyte (250 k tokens) is 8 steps.
# A low constant rate and few steps: the model knows English, it only has to hear another voice. Only what is better
# on the validation split is kept, since a small text is learned by heart soon.
out_dir = "out/finetune"
dataset = "mine"
init_from = "gpt2"

block_size = 1024
dropout = 0.1

batch_size = 4
gradient_accumulation_steps = 8

learning_rate = 3e-5
lr_schedule = "constant"
warmup_iters = 10
max_iters = 200

eval_interval = 10
always_save_checkpoint = False
log_interval = 1
