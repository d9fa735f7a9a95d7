"""Train GPT-2 on data/DATASET, or go on with the run in out_dir.

    python train.py config/demo.py
    python train.py config/wikitext103.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/wikitext103.py

Later wins: the defaults below, then config files, then --KEY=VALUE.
"""

import itertools
import math
import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from lib import ahead, captured, checkpoint, data, fit, prepare, processes, resume, runtime, settings
from lib.clock import Clock, clock_time
from lib.run import Run
from lib.settings import UserError
from model import GPT, GPTConfig
from muon import Muon

import torch


@dataclass
class Settings:
    # the run
    out_dir: str = "out"  # the run's folder: checkpoints and metrics.jsonl
    init_from: str = "scratch"  # scratch, resume (of a run), gpt2*, a Hugging Face folder, a checkpoint; a,b: the mean
    resume_from: str = ""  # a checkpoint from which a new run goes on, in an out_dir of its own; '' is none
    overwrite: bool = False  # True starts anew, and removes what a run has left in out_dir
    seed: int = 1337  # seed of the initial weights, of the order of the data and of dropout
    # data
    dataset: str = "wikitext103"  # a folder under data/
    batch_size: int = 12  # sequences in a micro-batch
    block_size: int = 1024  # tokens in a sequence
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes together
    auto_batch_size: bool = False  # True splits their product anew: as large as fits, on a CPU as fast as is found
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    n_inner: int = 0  # width of the MLP; 0 is 4 * n_embd
    dropout: float = 0.0  # share that is dropped of embeddings, attention and residual branches; 0 is off
    bias: bool = True  # biases in linear layers and layer norms
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw, muon (for the blocks' matrices, with AdamW for the rest)
    learning_rate: float = 6e-4  # the highest rate
    weight_decay: float = 0.1  # decay of matrices; biases and norms have none
    beta1: float = 0.9  # AdamW's decay of the mean of the gradients
    beta2: float = 0.95  # AdamW's decay of the mean of their squares
    momentum: float = 0.95  # Muon's decay of the mean of the gradients; 0.9 is better for runs of some hundred steps
    grad_clip: float = 1.0  # norm at which gradients are clipped; 0 is off
    # learning rate and length
    max_iters: int = 600_000  # steps of the run; 0 measures one, says what the whole takes and writes nothing
    max_epochs: float = 0.0  # passes over the train split instead of max_iters; 0 is off
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # cosine, linear, wsd, constant
    cooldown_frac: float = 0.4  # share of the steps, the last ones up to lr_decay_iters, in which wsd lowers the rate
    decay_lr: bool = True  # False takes the highest rate in every step, without warm-up and schedule
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 0  # the step at which the rate reaches min_lr; 0 is the end of the run
    min_lr: float = 6e-5  # the lowest rate
    # evaluation, logs, checkpoints
    eval_interval: int = 2000  # steps between evaluations, each with a checkpoint; 0 is never
    eval_iters: int = 0  # steps' worth of the validation split in an evaluation, always the same; 0 is the whole split
    patience: int = 0  # evaluations in a row with no better loss after which the run ends; 0 is off
    eval_only: bool = False  # True evaluates once and writes nothing
    log_interval: int = 10  # steps between lines of the log
    sample_tokens: int = 0  # tokens that the model writes after each evaluation, also to samples.txt; 0 is off
    always_save_checkpoint: bool = True  # True saves after every evaluation, False only after a better one
    save_interval: int = 0  # steps between checkpoints ckpt_iter_N.pt that are kept; 0 is off
    save_epochs: int = 0  # epochs between checkpoints ckpt_epoch_N.pt that are kept; 0 is off
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16
    compile: Literal["auto", True, False] = "auto"  # auto, True, False: torch.compile
    recompute: bool = False  # True computes each block again in the backward pass: less memory, a quarter slower
    deterministic: bool = False  # True gives the same bits in every run on a GPU, more slowly; a CPU does anyway
    backend: Literal["nccl", "gloo"] = "nccl"  # nccl, gloo: how processes on GPUs talk; those on CPUs use gloo
    # Weights & Biases, beside metrics.jsonl
    wandb_log: bool = False  # True logs to W&B too
    wandb_project: str = "gpt2"  # W&B's project
    wandb_entity: str = ""  # W&B's team or user; '' is your default one
    wandb_run_name: str = ""  # W&B's name of the run; '' lets W&B make one up
    wandb_tags: tuple[str, ...] = ()  # W&B's tags, written a,b
    wandb_log_checkpoints: bool = False  # True uploads each ckpt.pt and best.pt as an artifact


def check(s):
    """Raise UserError for settings that make no sense, alone or together."""
    settings.check(
        s,
        positive="batch_size block_size gradient_accumulation_steps n_layer n_head n_embd log_interval",
        not_negative="max_iters n_inner learning_rate weight_decay grad_clip max_epochs warmup_iters lr_decay_iters "
        "min_lr eval_interval eval_iters patience save_interval save_epochs seed sample_tokens",
        fraction="dropout beta1 beta2 momentum cooldown_frac",
        divisible="n_embd n_head",
        folder="out_dir",
    )
    if s.patience and not s.eval_interval:
        raise UserError(f"patience={s.patience} counts evaluations, and eval_interval=0 makes none; set one")
    if s.decay_lr and s.lr_schedule != "constant" and s.min_lr > s.learning_rate:
        raise UserError(
            f"min_lr={s.min_lr} is more than learning_rate={s.learning_rate}, and a rate that decays can't end higher; "
            "lower --min_lr"
        )
    if s.max_epochs > 1e9:
        raise UserError(f"max_epochs={s.max_epochs}: nobody has the time; take less")


def learning_rate_at(step, s, max_iters):
    """The rate of a step, counted from 0: linear warm-up, lr_schedule from learning_rate to min_lr, then min_lr."""
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == "constant":
        return s.learning_rate
    last = s.lr_decay_iters or max_iters
    first = max(s.warmup_iters, (1 - s.cooldown_frac) * last) if s.lr_schedule == "wsd" else s.warmup_iters
    if step < first:
        return s.learning_rate
    if step >= last:
        return s.min_lr
    left = (last - step) / (last - first)  # share of the way down that is still ahead
    if s.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return s.min_lr + left * (s.learning_rate - s.min_lr)


def micro_batches(dataset, tokens, s, rt, first_sequence):
    """Yield this process's micro-batches without end: (index in the step, inputs, targets (B, T) each), on the device.

    `first_sequence` is the first of a step. Raises UserError where the tokens have been overwritten meanwhile.
    """
    for i in itertools.count(rt.rank, rt.world_size):
        first = first_sequence + i * s.batch_size
        dataset.check_unchanged("train")
        batch = data.batch(tokens, s.block_size, s.seed, first, s.batch_size, dataset.vocab_size)
        yield i % s.gradient_accumulation_steps, *rt.to_device(*batch)


def evaluate(model, ids, s, rt, clock, stop=None):
    """Mean loss in nats over the targets of the `stream` windows of `ids`, shared out among the processes.

    ids (n,). The result is None where one of the processes has received the StopSignal `stop` meanwhile.
    """
    # eval_iters counts steps, since a step has the same sequences however it is split into micro-batches.
    per_step = s.batch_size * s.gradient_accumulation_steps
    windows = data.spread(data.stream_windows(len(ids), s.block_size), per_step, s.eval_iters)
    batches = [windows[i : i + s.batch_size] for i in range(0, len(windows), s.batch_size)]
    total = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, tokens, stop signals
    model.eval()
    for i in range(rt.rank, len(batches), rt.world_size):
        if stop and stop.number:
            total[2] = 1
            break
        clock.at("evaluation, batch", i, len(batches))
        x, y = rt.to_device(*data.window_batch(ids, batches[i], s.block_size))
        # Compiling a graph for evaluation would take longer than the graph saves.
        with rt.autocast(), torch.compiler.set_stance("force_eager"):
            nll = model.nll(x, y)
        total += torch.tensor([nll.cpu().double().sum().item(), len(nll), 0], dtype=torch.float64)
    clock.at("evaluation, batch", len(batches), len(batches))
    model.train()
    nll, scored, stops = rt.sum(total.to(rt.device) if rt.device.type == "cuda" else total).tolist()
    return None if stops else nll / scored


def make_model(s, start, dataset, rt):
    """The model that a run begins or goes on with, on the device. Its shape is recorded in the settings.

    Raises UserError where its weights can't be opened, or fit neither the data nor the settings nor the memory.
    """
    if start.path:
        model = checkpoint.build(start.ckpt, start.path)
    elif s.init_from == "scratch":
        shape = {key: getattr(s, key) for key in ("block_size", *resume.SHAPE)}
        config = GPTConfig(vocab_size=dataset.vocab_size, **shape)
        runtime.check_memory(config, s, rt)
        model = GPT(config)
    else:
        opened = checkpoint.open_model(s.init_from)
        dataset.check_tokenizer(opened)
        model, positions = opened.model, opened.model.config.block_size
        if s.block_size > positions:
            raise UserError(f"{opened.name} has {positions:,} positions; take --block_size={positions} or less")
        if s.block_size < positions:
            model.crop_block_size(s.block_size)
            cropped = f"cropped the model's {positions:,} positions to {s.block_size:,}, and an export has as many"
            rt.say(f"{cropped}; --block_size={positions} keeps them")
        unused = resume.unused_shape(s, vars(model.config))
        rt.say(f"starting from {opened.name}" + f"; {unused}" * bool(unused))
    for key in resume.SHAPE:
        setattr(s, key, getattr(model.config, key))
    model.set_dropout(s.dropout)
    model.recompute = s.recompute
    return model.to(rt.device).train()


def make_optimizer(s, model, rt):
    """(optimizer, scaler) before the first step. The scaler is for float16, and does nothing in another precision."""
    shared = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "fused": rt.device.type != "mps"}
    if s.optimizer == "muon":
        optimizer = Muon(model.optim_groups(s.weight_decay, muon=True), momentum=s.momentum, **shared)
    else:
        optimizer = torch.optim.AdamW(model.optim_groups(s.weight_decay), **shared)
    return optimizer, torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)


def make_micro_step(trained, scaler, accumulation, s, rt):
    """A function of inputs and targets (B, T) that adds a micro-batch's share to the gradients and returns its loss."""

    def micro_step(x, y):
        with rt.autocast():
            _, loss = trained(x, y)
        scaler.scale(loss / accumulation).backward()
        return loss.detach()

    return captured.micro_step(micro_step, trained, s, rt) if rt.compile and rt.device.type == "cuda" else micro_step


def kept_names(s, state, sequences_per_step, sequences_per_epoch):
    """The names under which the checkpoint of this step is kept."""
    is_due = s.save_interval and state.step and state.step % s.save_interval == 0
    names = [f"ckpt_iter_{state.step}.pt"] if is_due else []
    epoch = state.sequence // sequences_per_epoch
    epoch_before = max(0, state.sequence - sequences_per_step) // sequences_per_epoch
    if s.save_epochs and epoch // s.save_epochs > epoch_before // s.save_epochs:
        names.append(f"ckpt_epoch_{epoch}.pt")
    return names


def log_line(row, max_iters, seconds_left):
    """The line of the log that shows a row of metrics.jsonl."""
    parts = [f"step {row['step']:,}/{max_iters:,}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.4f}"]
    parts += [f"lr {row['lr']:.2e}", f"norm {row['grad_norm']:.2f}", f"{row['tokens_per_sec']:,.0f} tokens/s"]
    parts += [f"MFU {row['mfu']:.1%}"] if row["mfu"] else []
    parts += [f"scale {row['loss_scale']:.0f}, {row['skipped_steps']:,} skipped"] if "loss_scale" in row else []
    return " | ".join([*parts, f"{clock_time(int(seconds_left))} left"])


def main():
    s = settings.load(Settings)
    check(s)
    out_of_memory = runtime.memory_advice(ahead.smaller_batch, s)
    with processes.lost_process_advice(), out_of_memory, checkpoint.Writer() as writer:
        status = train(s, writer)
        processes.leave()  # An evaluation and a finished run have not left yet.
    sys.exit(status)


def train(s, writer):
    """The whole run. Returns the exit status: 0, or 128 plus the number of the signal that stopped it."""
    # ---- machine ----
    rt = runtime.choose(s.device, s.dtype, s.compile, training=True, deterministic=s.deterministic)
    sequences_per_step = s.batch_size * s.gradient_accumulation_steps
    rt.check_share(s)

    # ---- data: it is opened before the processes meet, since one of them may prepare it for an hour ----
    prepare.ensure(s.dataset)
    dataset = data.Dataset(s.dataset)
    dataset.verify("train")
    tokens = dataset.tokens("train")
    val_ids = dataset.validation_ids() if s.eval_only or s.eval_interval else None
    sequences_per_epoch = data.blocks_per_epoch(len(tokens), s.block_size)
    tokens_per_step = sequences_per_step * s.block_size
    steps_of_epochs = math.ceil(round(s.max_epochs * sequences_per_epoch / sequences_per_step, 6))
    max_iters = steps_of_epochs or s.max_iters or ahead.planned_iters(Settings)
    processes.meet_all(rt, s.backend)
    processes.check_agreement(rt, s, dataset.checksums)
    rt.say(rt.why)
    length = f"{max_iters:,} steps" + (f" by max_epochs={s.max_epochs:g}" if s.max_epochs else "")
    steps_per_epoch = sequences_per_epoch / sequences_per_step
    size = f"{dataset.size('train'):,} tokens, {tokens_per_step:,} a step"
    rt.say(f"{size}, {steps_per_epoch:,.1f} steps an epoch, {length}")
    for line in ahead.warnings(s, max_iters, steps_per_epoch) if not s.eval_only else ():
        rt.say(line)

    # ---- model and optimizer, of a run to go on with or of a new one ----
    torch.manual_seed(s.seed)
    start = resume.find(s, dataset, rt)
    state = start.state
    if resume.is_finished(s, start, max_iters, rt):
        return 0
    model = make_model(s, start, dataset, rt)
    fit.choose_batch_size(model, s, start, rt)
    accumulation = s.gradient_accumulation_steps // rt.world_size  # this process's micro-batches in a step
    flops = model.flops_per_token()
    rt.say(ahead.size(model, s, rt))
    clock = Clock(rt)
    if s.eval_only:
        rt.say(f"step {state.step:,} | val loss {evaluate(model, val_ids, s, rt, clock):.4f}")
        return 0
    optimizer, scaler = make_optimizer(s, model, rt)
    resume.restore(start, optimizer, scaler)
    runtime.compile_parts(model, rt, s.batch_size, s.block_size)
    # The model is what is evaluated and saved. `trained` is the same, wrapped in DDP where there are several processes.
    trained = processes.wrap(model, rt, s.batch_size, s.block_size)
    micro_step = make_micro_step(trained, scaler, accumulation, s, rt)
    batches = micro_batches(dataset, tokens, s, rt, state.sequence)
    if not s.max_iters:
        rt.say(ahead.estimate(micro_step, batches, accumulation, optimizer, max_iters, steps_per_epoch, clock))
        return 0
    run = Run(s, rt, writer, start, model, optimizer, scaler, dataset)
    start.ckpt = {}  # This gives its memory back.

    # ---- the loop ----
    stop, stopping = processes.StopSignal(rt), False
    ready = next(batches)
    peak = rt.peak_flops() * rt.world_size
    while True:
        # -- the state is the one after `state.step` steps: evaluate it, save it, log it
        run.collect()
        due = s.eval_interval > 0 and (state.step % s.eval_interval == 0 or state.step == max_iters)
        if due and "val_loss" not in state.row and not stopping:
            run.evaluated(evaluate(model, val_ids, s, rt, clock, stop))
        # After a signal there may be no time for an evaluation. A resume makes it, since the row lacks it.
        put_off = due and "val_loss" not in state.row
        run.save_what_is_due(kept_names(s, state, sequences_per_step, sequences_per_epoch))
        run.log_row()
        ended = run.ended(max_iters) and not put_off
        if ended or put_off or stopping:
            break
        state.row = {}

        # -- one step
        clock.begin_step(max_iters - state.step)
        rate = learning_rate_at(state.step, s, max_iters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_sum = torch.zeros((), device=rt.device)
        for i in range(accumulation):
            clock.at_micro_batch(state.step + 1, i, accumulation)
            micro, x, y = ready  # x, y (B, T)
            torch.manual_seed(data.seed_of(s.seed, state.step, micro))  # dropout's seed
            # DDP sums gradients in the last backward pass only, as its no_sync() has it. Other models ignore this.
            trained.require_backward_grad_sync = i == accumulation - 1
            loss_sum += micro_step(x, y) / s.gradient_accumulation_steps
            ready = next(batches)  # The next micro-batch is made and sent while a GPU still works on this one.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        # This is the only wait for the device in a step. A signal that one process received is summed with the losses,
        # so that all processes stop after the same step.
        sums = rt.sum(torch.stack([loss_sum, loss_sum.new_full((), stop.number)]))
        is_logged = (state.step + 1) % s.log_interval == 0 or state.step + 1 == max_iters
        # All four are of the weights before the step.
        weight_norm = torch.nn.utils.get_total_norm(model.parameters()) if is_logged else torch.zeros_like(norm)
        loss, signals, norm, weight_norm = torch.cat([sums, torch.stack([norm, weight_norm])]).tolist()
        stopping = signals > 0
        if run.takes_step(loss, norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not isinstance(micro_step, captured.Recorded))
        state.step, state.sequence = state.step + 1, state.sequence + sequences_per_step
        clock.end_step()

        # -- report
        if is_logged:
            speed = tokens_per_step / clock.lap()
            state.row = {
                "step": state.step,
                "tokens": state.step * tokens_per_step,
                "epoch": state.sequence / sequences_per_epoch,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "weight_norm": weight_norm,
                "tokens_per_sec": speed,
                "mfu": speed * flops / peak if peak else None,
            }
            if scaler.is_enabled():
                state.row |= {"loss_scale": scaler.get_scale(), "skipped_steps": state.skipped}
            rt.say(log_line(state.row, max_iters, clock.left(max_iters - state.step)))

    # ---- the end ----
    run.finish(interrupted=not ended)
    del trained, micro_step
    processes.leave()  # The other processes do not wait for an upload.
    run.close()
    if not ended:
        rt.say(f"stopped by a signal after step {state.step:,}; {run.same_command} goes on from {run.ckpt_path}")
        return stop.status()
    if state.step < max_iters:
        rt.say(f"no better validation loss than {state.best_val_loss:.4f} in {state.worse} evaluations")
    rt.say(f"finished {state.step:,} steps; python sample.py --out_dir={shlex.quote(s.out_dir)}")
    return 0


if __name__ == "__main__":
    settings.run(main)
