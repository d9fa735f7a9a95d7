# Fine-tune GPT-2's published weights on your own text.
#     python prepare_text.py MY_FILES --dataset=mine
#     python train.py config/finetune.py --dataset=mine --out_dir=out/mine
#
# A step is 8 x 4 = 32 sequences x 1,024 tokens = 32,768 tokens, in the largest micro-batches that fit. A book of a
# megabyte, 250 k tokens, is 8 steps.
#
# The rate is low and constant, and the steps are few, because the model knows English already and only has to learn a
# style. It soon learns a small text by heart, so a checkpoint is kept only where the validation loss is lower.
out_dir = "out/finetune"
dataset = "mine"
init_from = "gpt2"

block_size = 1024
dropout = 0.1

auto_batch_size = True
batch_size = 4
gradient_accumulation_steps = 8

learning_rate = 3e-5
lr_schedule = "constant"
warmup_iters = 10
max_iters = 200

eval_interval = 10
always_save_checkpoint = False
log_interval = 1
