"""Train GPT-2 on data/DATASET, or go on with the run in out_dir.

    python train.py config/demo.py
    python train.py config/wikitext103.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/wikitext103.py

Later wins: the defaults below, then config files, then --KEY=VALUE.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

import checkpoint
import config
import data
import runtime
from model import GPT, GPTConfig
from muon import Muon


@dataclass
class Settings:
    # the run
    out_dir: str = "out"  # where checkpoints and metrics.jsonl go
    init_from: str = "scratch"  # scratch, resume (there must be a run), gpt2*, a Hugging Face folder, a checkpoint
    resume_from: str = ""  # go back to this checkpoint of the run
    overwrite: bool = False  # start anew where out_dir holds a run
    seed: int = 1337  # initial weights, order of the data, dropout
    # data
    dataset: str = "wikitext103"  # the folder data/DATASET
    batch_size: int = 12  # sequences in a micro-batch
    block_size: int = 1024  # tokens in a sequence
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes together
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    n_inner: int = 0  # width of the MLP; 0 is 4 * n_embd
    dropout: float = 0.0  # on embeddings, attention and residual branches
    bias: bool = True  # biases in linear layers and layer norms
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw, muon: that on the blocks' matrices, AdamW on the rest
    learning_rate: float = 6e-4  # the highest
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW's decay of the gradients' mean
    beta2: float = 0.95  # AdamW's decay of the gradients' mean square
    momentum: float = 0.95  # Muon's alone, decay of the gradients' mean; 0.9 for runs of some hundred steps
    grad_clip: float = 1.0  # norm to clip gradients at; 0 is off
    # learning rate and length
    max_iters: int = 600_000  # steps
    max_epochs: float = 0.0  # passes over the train split, instead of max_iters; 0 is off
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # linear, constant, wsd: flat, then linear
    cooldown_frac: float = 0.4  # share of the steps in which wsd goes down to min_lr, the last ones
    decay_lr: bool = True  # False is lr_schedule=constant
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 0  # the step at which the rate reaches min_lr; 0 is the last
    min_lr: float = 6e-5  # the lowest
    # evaluation, logs, checkpoints
    eval_interval: int = 2000  # steps between evaluations, each with a checkpoint; 0 is never
    eval_iters: int = 0  # batches of the validation split in an evaluation, always the same; 0 is the whole split
    patience: int = 0  # evaluations in a row with no better loss that end the run; 0 is off
    eval_only: bool = False  # evaluate once and write nothing
    log_interval: int = 10  # steps between lines of the log
    always_save_checkpoint: bool = True  # else an evaluation saves only what is better than before
    save_interval: int = 0  # steps between ckpt_iter_N.pt, which are kept; 0 is off
    save_epochs: int = 0  # epochs between ckpt_epoch_N.pt, which are kept; 0 is off
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16
    compile: Literal["auto", True, False] = "auto"  # auto, True, False: torch.compile
    recompute: bool = False  # each block again in the backward pass: slower by a quarter, in less memory
    deterministic: bool = False  # on a CUDA GPU the same command gives the same bits, slower; a CPU does anyway
    backend: Literal["nccl", "gloo"] = "nccl"  # nccl, gloo: of several processes on GPUs; on a CPU it is gloo
    # Weights & Biases; metrics.jsonl is written all the same
    wandb_log: bool = False  # log there too
    wandb_project: str = "gpt2"  # the project there
    wandb_entity: str = ""  # the team or user; '' is your default one
    wandb_run_name: str = ""  # '' lets W&B make one up
    wandb_tags: tuple[str, ...] = ()  # a,b
    wandb_log_checkpoints: bool = False  # each ckpt.pt and best.pt as an artifact


# Whatever else differs at a resume is printed and takes effect.
SHAPE = ("n_layer", "n_head", "n_embd", "n_inner", "bias")
MUST_AGREE = ("block_size", *SHAPE, "seed", "optimizer")
MAY_DIFFER_UNSAID = ("out_dir", "init_from", "resume_from", "overwrite", "eval_only")
# What a run writes into out_dir, and what a new one removes there.
RUN_FILES = ("ckpt.pt", "best.pt", "final.pt", "ckpt_iter_*.pt", "ckpt_epoch_*.pt", "eval_*.json", "metrics.jsonl")
# A run of so many steps with a non-finite loss or gradient is not going to recover.
MAX_SKIPPED_IN_A_ROW = 5
RETRY_SECONDS = 60  # from a checkpoint that could not be written to the next attempt


def check(s):
    config.check(
        s,
        positive="batch_size block_size gradient_accumulation_steps n_layer n_head n_embd max_iters log_interval",
        not_negative="n_inner learning_rate weight_decay grad_clip max_epochs warmup_iters lr_decay_iters min_lr "
        "eval_interval eval_iters patience save_interval save_epochs seed",
        fraction="dropout beta1 beta2 momentum cooldown_frac",
        divisible="n_embd n_head",
    )
    if s.patience and not s.eval_interval:
        raise config.UserError(f"patience={s.patience} counts evaluations, and eval_interval=0 makes none; set one")
    if s.decay_lr and s.lr_schedule != "constant" and s.min_lr > s.learning_rate:
        raise config.UserError(
            f"min_lr={s.min_lr} is more than learning_rate={s.learning_rate}, and a rate that decays can't end higher; "
            "lower --min_lr"
        )
    if s.max_epochs > 1e9:
        raise config.UserError(f"max_epochs={s.max_epochs}: nobody has the time; take less")


def check_memory(model_config, s, rt):
    """Raise UserError for what cannot fit: better at once than killed by the system after minutes of swapping."""
    parameters, tokens = model_config.num_params(), s.batch_size * s.block_size
    # Weights, gradients and two moments in float32; of a token its ids and, for the backward pass, at the very least
    # the inputs of the two branches of each block, or of the block alone where it is computed again.
    kept = (1 if s.recompute else 2) * model_config.n_layer * model_config.n_embd
    needed = 16 * parameters + tokens * (16 + kept * rt.dtype.itemsize)
    if needed > rt.memory() > 0:
        raise config.UserError(
            f"{parameters / 1e6:,.0f} M parameters and {tokens:,} tokens in a micro-batch take more than "
            f"{needed / 2**30:,.0f} GiB, {rt.device} has {rt.memory() / 2**30:,.0f}; take a smaller n_layer, n_embd, "
            "n_inner or batch_size"
        )


def learning_rate_at(step, s, max_iters):
    """The rate of a step, counted from 0: linear warm-up, lr_schedule from learning_rate to min_lr, then min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == "constant" or not s.decay_lr:
        return s.learning_rate
    last = s.lr_decay_iters or max_iters
    first = max(s.warmup_iters, (1 - s.cooldown_frac) * last) if s.lr_schedule == "wsd" else s.warmup_iters
    if step < first:
        return s.learning_rate
    if step >= last:
        return s.min_lr
    left = (last - step) / (last - first)  # of the way down, from 1 to 0
    if s.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return s.min_lr + left * (s.learning_rate - s.min_lr)


def micro_batches(tokens, s, rt, first_sequence):
    """The micro-batches of this process from a sequence on: (index in the step, inputs, targets), on the device."""
    for i in itertools.count(rt.rank, rt.world_size):
        batch = data.batch(tokens, s.block_size, s.seed, first_sequence + i * s.batch_size, s.batch_size)
        yield i % s.gradient_accumulation_steps, *rt.to_device(*batch)


def evaluate(model, ids, s, rt):
    """Mean loss in nats over the targets of the `stream` windows of `ids`, shared out among the processes."""
    windows = data.stream_windows(len(ids), s.block_size)
    batches = [windows[i : i + s.batch_size] for i in range(0, len(windows), s.batch_size)]
    if 0 < s.eval_iters < len(batches):  # spread over the split
        batches = [batches[i * len(batches) // s.eval_iters] for i in range(s.eval_iters)]
    total = torch.zeros(2, dtype=torch.float64)  # negative log-likelihood, tokens
    model.eval()
    for part in batches[rt.rank :: rt.world_size]:
        x, y = rt.to_device(*data.window_batch(ids, part, s.block_size))
        with rt.autocast(), torch.compiler.set_stance("force_eager"):  # a graph of its own takes longer than it saves
            nll = model.nll(x, y)
        total += torch.tensor([nll.cpu().double().sum().item(), len(nll)], dtype=torch.float64)
    model.train()
    nll, scored = rt.sum(total.to(rt.device) if rt.device.type == "cuda" else total).tolist()
    return nll / scored


def settings_to_go_on(s, then):
    """A command's settings beside those of a checkpoint; the shape of a run from other weights was never among them."""
    return asdict(s) | ({} if then.get("init_from") == "scratch" else {k: then[k] for k in SHAPE if k in then})


def changed(then, now):
    """The settings in which a command differs from a checkpoint; what the checkpoint does not know is none."""
    return [k for k, v in now.items() if k not in MAY_DIFFER_UNSAID and then.get(k, v) != v]


def run_to_resume(s):
    """The checkpoint that this command goes on from, or None where it starts a run."""
    last = Path(s.out_dir, "ckpt.pt")
    if s.overwrite and (s.resume_from or s.init_from == "resume"):
        raise config.UserError("overwrite=True starts anew, resume_from and init_from=resume go on; give one of them")
    if s.eval_only and s.init_from != "resume":
        return Path(s.resume_from) if s.resume_from else None
    if s.init_from == "resume" and not last.exists():
        raise config.UserError(f"init_from=resume: there is no {last} to resume; check out_dir, or start from scratch")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a failure
    if s.overwrite and not (restarted and last.exists() and checkpoint.load(last)["config"].get("overwrite")):
        source, out = Path(s.init_from).resolve(), Path(s.out_dir).resolve()
        files = [path.resolve() for name in RUN_FILES for path in out.glob(name)]
        its_run = source == out and s.init_from != "scratch" and not (out / "config.json").exists()
        if files and (its_run or source in files):
            raise config.UserError(
                f"overwrite=True would remove init_from={s.init_from} itself; take another --out_dir"
            )
        return None
    if s.resume_from:
        # The command that went back there before, and was cut off since, goes on from where it came to, or on to a
        # greater length; once it has finished, other settings are another attempt.
        with contextlib.suppress(checkpoint.CheckpointError):  # a damaged one is what people go back from
            then = checkpoint.load(last)["config"] if last.exists() else {}
            same = set(changed(then, settings_to_go_on(s, then))) <= {"max_iters", "max_epochs"}
            if then.get("resume_from") == s.resume_from and (same or not Path(s.out_dir, "final.pt").exists()):
                return last
        if last.exists() and Path(s.resume_from).resolve().parent != last.resolve().parent:
            here = Path(s.resume_from).parent
            raise config.UserError(f"{s.out_dir} holds another run than {here}; --out_dir={here}, or take a new one")
        return Path(s.resume_from)
    if last.exists():
        return last
    if kept := sorted(p.name for name in RUN_FILES for p in Path(s.out_dir).glob(name) if p.suffix == ".pt"):
        raise config.UserError(
            f"{s.out_dir} has {kept[0]} but no ckpt.pt to go on from; take another --out_dir, --resume_from=PATH, or "
            "--overwrite=True, which removes what is there"
        )
    return None


def stamp(path):
    """What changes when a file is replaced; None for no file."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns


def holds_loss(path, val_loss):
    """Whether `path` has weights of this validation loss."""
    with contextlib.suppress(checkpoint.CheckpointError):
        return checkpoint.load(path).get("best_val_loss") == val_loss
    return False


def check_agreement(ckpt, path, s, dataset, data_sha256):
    """Raise UserError where a checkpoint cannot be gone on with under these settings. Returns what else differs."""
    if "format" not in ckpt:
        raise config.UserError(
            f"{path} is nanoGPT's, which does not say where in the data it was; start a new run from its weights: "
            f"--init_from={path} and another --out_dir"
        )
    if "sequence_index" not in ckpt:
        raise config.UserError(
            f"{path} holds weights alone; a new run starts from them by --init_from={path} and another --out_dir"
        )
    then = ckpt["config"]
    now = settings_to_go_on(s, then)
    tokens = [c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"] for c in (then, now)]
    pairs = {key: (then.get(key), now[key]) for key in MUST_AGREE} | {"tokens a step": tuple(tokens)}
    wrong = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
    if ckpt["data_sha256"] != data_sha256:
        wrong.append(f"the tokens of data/{s.dataset}/train.bin are others")
    if ckpt["tokenizer"] != dataset.tokenizer_spec:
        wrong.append(f"the tokenizer was {ckpt['tokenizer'][:40]!r} and is {dataset.tokenizer_spec[:40]!r}")
    if wrong:
        raise config.UserError(
            f"{path} can't be resumed: {'; '.join(wrong)}; take it back, or start a run by another --out_dir or "
            "--overwrite=True"
        )
    return [f"{key} {then[key]} -> {now[key]}" for key in changed(then, now)]


def keep_rows_before(path, step):
    """Drop the rows of metrics.jsonl from a step on, and a last one cut short."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            rows += [line] if json.loads(line)["step"] < step else []
    checkpoint.write_text(path, "".join(row + "\n" for row in rows))


def append_line(path, line):
    """Add a line to a file, or, where not all of it can be written, nothing."""
    with open(path, "ab", buffering=0) as f:
        end, content = f.seek(0, os.SEEK_END), (line + "\n").encode()
        try:
            if f.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


class WandB:
    """A W&B run that can fail without ending the training: it says so once and logs no more. .id is '' without one."""

    def __init__(self, s, run_id):
        self.run, self.id = None, run_id
        if s.wandb_log:
            self.attempt(self.start, s)

    def start(self, s):
        import wandb

        self.run = wandb.init(
            project=s.wandb_project,
            entity=s.wandb_entity or None,
            name=s.wandb_run_name or None,
            tags=s.wandb_tags or None,
            id=self.id or None,
            resume="allow",
            config=asdict(s),
        )
        self.id = self.run.id
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # against our own step, which a resume may set back

    def attempt(self, action, *args, **kwargs):
        try:
            action(*args, **kwargs)
        except Exception as error:  # whatever a service may raise
            print(f"W&B failed ({' '.join(str(error).split())[:200]}); training goes on without it", flush=True)
            self.run = None

    def log(self, row):
        if self.run:
            self.attempt(self.run.log, row)

    def log_file(self, path):
        if self.run:
            self.attempt(self.run.log_artifact, str(path), name=f"{self.id}-{path.stem}", type="model")

    def finish(self):
        if self.run:
            self.attempt(self.run.finish)


def main():
    s = config.load(Settings)
    check(s)
    b, accumulation = s.batch_size, s.gradient_accumulation_steps
    less = next((b // d for d in range(2, min(b, 1000) + 1) if b % d == 0), 0)
    advice = "no batch is smaller, so take a smaller block_size or model"
    if less:
        advice = f"--batch_size={less} --gradient_accumulation_steps={accumulation * b // less} trains the same in less"
    with runtime.lost_process_advice(), runtime.memory_advice(f" with batch_size={b}; {advice}"):
        with checkpoint.Writer() as writer:
            status = train(s, writer)
        runtime.leave_processes()
    sys.exit(status)


def train(s, writer):
    """The whole run. Returns the exit status: 0, or 128 and the number of the signal that stopped it."""
    # ---- data, before the processes form a group: the first of a machine may prepare for an hour ----
    data.ensure(s.dataset)
    dataset = data.Dataset(s.dataset)
    tokens = dataset.tokens("train")
    sequences_per_epoch = data.blocks_per_epoch(len(tokens), s.block_size)
    sequences_per_step = s.batch_size * s.gradient_accumulation_steps
    tokens_per_step = sequences_per_step * s.block_size
    max_iters = math.ceil(s.max_epochs * sequences_per_epoch / sequences_per_step) if s.max_epochs else s.max_iters
    data_sha256 = dataset.verify("train")
    if s.eval_only or s.eval_interval:
        val_ids = dataset.text_ids("val") if "val" in dataset.paths else ()
        if len(val_ids) < 2:
            raise config.UserError(
                f"{dataset.folder} has no val split of two tokens or more; prepare one, or train by --eval_interval=0"
            )

    # ---- machine ----
    rt = runtime.choose(s.device, s.dtype, s.compile, training=True, deterministic=s.deterministic)
    if s.gradient_accumulation_steps % rt.world_size:
        raise config.UserError(
            f"gradient_accumulation_steps={s.gradient_accumulation_steps} counts over all processes together and is "
            f"not divisible by {rt.world_size} of them; --gradient_accumulation_steps="
            f"{math.ceil(s.gradient_accumulation_steps / rt.world_size) * rt.world_size}"
        )
    runtime.start_processes(rt, s.backend)
    master, mine = rt.rank == 0, s.gradient_accumulation_steps // rt.world_size  # micro-batches of this process

    def say(line):
        if master:
            print(line, flush=True)

    say(rt.why)
    length = f"{max_iters:,} steps" + (f" by max_epochs={s.max_epochs:g}" if s.max_epochs else "")
    say(f"{tokens_per_step:,} tokens a step, {sequences_per_epoch / sequences_per_step:,.1f} steps an epoch, {length}")

    # ---- model: a run to go on with, or one to start ----
    torch.manual_seed(s.seed)
    out, last = Path(s.out_dir), Path(s.out_dir, "ckpt.pt")
    found = stamp(last)
    ckpt, step, first_sequence, best_val_loss, worse, row, skipped, stale = {}, 0, 0, math.inf, 0, {}, 0, False
    resume_path = run_to_resume(s)
    gone_back = bool(resume_path) and resume_path.resolve() != last.resolve()
    if resume_path:
        ckpt = checkpoint.load(resume_path)
        changes = check_agreement(ckpt, resume_path, s, dataset, data_sha256)
        model = checkpoint.build(ckpt, resume_path)
        step, first_sequence, best_val_loss = ckpt["iter_num"], ckpt["sequence_index"], ckpt["best_val_loss"]
        row, skipped, worse = ckpt["row"], ckpt["skipped_steps"], ckpt["worse_evaluations"]
        s.init_from = ckpt["config"]["init_from"]  # where the run's weights came from, which a resume doesn't change
        if stale := gone_back and not holds_loss(out / "best.pt", best_val_loss):
            best_val_loss, worse = row.get("val_loss", math.inf), 0  # the weights of a better one are gone
        say(f"resuming {resume_path} at step {step:,}" + "".join(f"; {change}" for change in changes))
    elif s.init_from == "scratch":
        shape = {k: getattr(s, k) for k in ("block_size", *SHAPE)}
        model_config = GPTConfig(vocab_size=dataset.vocab_size, **shape)
        check_memory(model_config, s, rt)
        model = GPT(model_config)
    else:
        opened = checkpoint.open_model(s.init_from)
        model = opened.model
        dataset.check_tokenizer(opened)
        if s.block_size > (positions := model.config.block_size):
            raise config.UserError(f"{s.init_from} has {positions:,} positions; --block_size={positions} or less")
        if s.block_size < positions:
            model.crop_block_size(s.block_size)
            say(f"cropped the model's {positions:,} positions to {s.block_size:,}")
        say(f"starting from {opened.name}")

    def ended():
        return step == max_iters or 0 < s.patience <= worse

    if gone_back and step > max_iters and not s.eval_only:
        raise config.UserError(
            f"{resume_path} is of step {step:,}, this command ends at {max_iters:,}; raise its length"
        )
    finished = step > max_iters or not gone_back and ended() and (out / "final.pt").exists()
    if not rt.same((step, finished)):
        raise config.UserError(f"the processes find different checkpoints in {s.out_dir}; put it on a shared disk")
    if finished and not s.eval_only:
        longer = "patience" if step < max_iters else "max_epochs" if s.max_epochs else "max_iters"
        say(f"{s.out_dir} has finished at step {step:,}; raise {longer}, or start anew by --overwrite=True")
        return 0
    for key in SHAPE:
        setattr(s, key, getattr(model.config, key))  # what is recorded is the model's, wherever it came from
    model.set_dropout(s.dropout)
    model.recompute = s.recompute
    model.to(rt.device).train()
    size, flops = model.num_params(), model.flops_per_token()
    say(f"{size / 1e6:.5g} M parameters without positions, {flops / 1e9:.4g} GFLOP a token")
    if s.eval_only:
        say(f"step {step:,} | val loss {evaluate(model, val_ids, s, rt):.4f}")
        return 0
    shared = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "fused": rt.device.type != "mps"}
    if s.optimizer == "muon":
        optimizer = Muon(model.optim_groups(s.weight_decay, muon=True), momentum=s.momentum, **shared)
    else:
        optimizer = torch.optim.AdamW(model.optim_groups(s.weight_decay), **shared)
    may_change = [{k: g[k] for k in ("weight_decay", "betas", "momentum") if k in g} for g in optimizer.param_groups]
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
        for group, own in zip(optimizer.param_groups, may_change, strict=True):
            group.update(own)
        if scaler.is_enabled() and ckpt["scaler"]:
            scaler.load_state_dict(ckpt["scaler"])
    if rt.compile:
        runtime.compile_blocks(model, rt, s.batch_size, s.block_size)
    # The model is what is evaluated and saved; `trained` is the same, wrapped where gradients are averaged.
    trained = runtime.wrap(model, rt, s.batch_size, s.block_size)

    # ---- the folder of the run ----
    if master:
        try:
            out.mkdir(parents=True, exist_ok=True)
            held = FileLock(out / ".lock")  # let go by the system, however this process ends
            held.acquire(timeout=0)
            if stamp(last) != found:
                raise config.UserError(f"another process has just saved {last}; the same command goes on from there")
            # Of a write that was killed; and of an older run, which is to be overwritten.
            for pattern in [f"{name}.partial" for name in RUN_FILES] + list(RUN_FILES if not resume_path else ()):
                for old in out.glob(pattern):
                    old.unlink()
        except Timeout:
            raise config.UserError(f"another process trains in {out}; stop it, or name another --out_dir") from None
        except OSError as error:
            at = f", {error.filename}" if error.filename else ""
            raise config.UserError(f"out_dir={out} can't be written ({error.strerror}{at}); name another") from None
        same_folder = resume_path and resume_path.resolve().parent == out.resolve()
        wandb = WandB(s, ckpt["wandb_run_id"] if same_folder else "")
    resumed_at, failed_at, best_written = step if ckpt else -1, 0.0, best_val_loss
    saved_at = -1 if gone_back else resumed_at
    del ckpt

    def diverged(how):
        writer.finished(wait=True)
        then = f"the last good checkpoint stands in {out}: go on from it" if last.exists() else "start"
        return config.UserError(f"the run has diverged at step {step:,}: {how}; {then} with a lower --learning_rate")

    def save(name, *links):
        """Write the run, or the weights alone for best.pt and final.pt. A failure is said; it is no end by itself."""
        if not master:
            return
        if not torch.stack([x for p in model.parameters() for x in torch.aminmax(p.detach())]).isfinite().all():
            raise diverged("the weights are not finite")
        state = checkpoint.weights(model) | {
            "format": checkpoint.FORMAT,
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": asdict(s),
            "tokenizer": dataset.tokenizer_spec,
        }
        if name == "ckpt.pt":
            state |= {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "sequence_index": first_sequence,
                "skipped_steps": skipped,
                "worse_evaluations": worse,
                "row": row,  # of this step, as far as it has come
                "data_sha256": data_sha256,
                "wandb_run_id": wandb.id,
            }

        def written(error, step=step, loss=best_val_loss):
            nonlocal saved_at, failed_at, best_val_loss, best_written
            if not error:
                if name == "ckpt.pt":
                    saved_at = step
                    (out / "final.pt").unlink(missing_ok=True)  # left from when max_iters was smaller
                best_written = loss if name == "best.pt" else best_written
                if s.wandb_log_checkpoints and name != "final.pt":
                    wandb.log_file(out / name)
                return
            failure = f"{' and '.join([str(out / name), *links])} could not be written ({error.strerror or error})"
            if not last.exists():
                raise config.UserError(f"{failure}; make room there, or name another --out_dir")
            if name == "ckpt.pt":
                failed_at = time.monotonic()
                failure += f"; the older one stands, the next attempt at ckpt.pt follows in {RETRY_SECONDS} s"
            if name == "best.pt" and best_val_loss == loss:
                best_val_loss = best_written  # the next that is better than what is on the disk
            say(failure)

        writer.write(out / name, state, [out / link for link in links], written)

    if master:
        if gone_back:  # which lasts from here on; without room for it nothing is undone
            save("ckpt.pt")
            writer.finished(wait=True)
            if saved_at != step:
                raise config.UserError(f"{resume_path} is not gone back to: make room in {out}, and try again")
        if stale:  # of steps that are gone back from
            (out / "best.pt").unlink(missing_ok=True)
        keep_rows_before(out / "metrics.jsonl", step)

    # ---- the loop ----
    stop, stopping = runtime.StopSignal(), False
    batches = micro_batches(tokens, s, rt, first_sequence)
    ready = next(batches)
    skipped_in_a_row, speeds, since, steps_since = 0, deque(maxlen=20), time.perf_counter(), 0
    peak = rt.peak_flops() * rt.world_size
    while True:
        # -- the state is the one after `step` steps: evaluate it, save it, write its row
        began, links = time.perf_counter(), []
        writer.finished()
        evaluates = s.eval_interval and (step % s.eval_interval == 0 or step == max_iters)
        evaluates = evaluates and "val_loss" not in row and not (stopping and step < max_iters)
        if evaluates:
            val_loss, saved_at = evaluate(model, val_ids, s, rt), -1  # ckpt.pt does not know it yet
            row |= {"step": step, "tokens": step * tokens_per_step, "val_loss": val_loss}
            say(f"step {step:,} | val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}")
            if not math.isfinite(val_loss):
                raise diverged(f"the validation loss is {val_loss}")
            best_val_loss = rt.of_the_first(best_val_loss)  # which alone knows of a best.pt that could not be written
            worse = 0 if val_loss < best_val_loss else worse + 1
            best_val_loss = min(best_val_loss, val_loss)
        better = row.get("val_loss") == best_val_loss  # the run may have been killed before best.pt was written
        kept = step != resumed_at  # else it was kept when it was reached, as the run was then
        if s.save_interval and step % s.save_interval == 0 and step and kept:
            links.append(f"ckpt_iter_{step}.pt")
        ends = max(0, first_sequence - sequences_per_step), first_sequence  # of the last step
        before, epoch = (sequence // sequences_per_epoch for sequence in ends)
        if s.save_epochs and epoch // s.save_epochs > before // s.save_epochs and kept:
            links.append(f"ckpt_epoch_{epoch}.pt")
        again = failed_at and time.monotonic() - failed_at > RETRY_SECONDS
        saves = links or again or evaluates and (better or s.always_save_checkpoint)
        if saved_at != step and (saves or step == 0):  # the first one shows at once whether the disk takes it
            failed_at = 0.0
            save("ckpt.pt", *links)
        if better and (step or s.init_from != "scratch"):  # what has learned nothing is no best
            save("best.pt")
        if master and row and not (stopping and step < max_iters and saved_at != step):  # else the resume writes it
            # JSON has no NaN and no infinity: null says that a figure was not finite.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            try:
                append_line(out / "metrics.jsonl", json.dumps(finite))
            except OSError as error:
                say(f"{out / 'metrics.jsonl'} could not be written ({error.strerror}); training goes on")
            wandb.log(row)
        if ended() or stopping:
            break
        row = {}
        since += time.perf_counter() - began  # none of this is training time

        # -- one step
        rate = learning_rate_at(step, s, max_iters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_sum = torch.zeros((), device=rt.device)
        for i in range(mine):
            micro, x, y = ready
            torch.manual_seed(data.seed_of(s.seed, step, micro))
            with trained.no_sync() if i < mine - 1 and rt.world_size > 1 else contextlib.nullcontext():
                with rt.autocast():
                    _, loss = trained(x, y)
                scaler.scale(loss / mine).backward()
            ready = next(batches)  # made and sent while a GPU still works on this one
            loss_sum += loss.detach() / s.gradient_accumulation_steps
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        sums = rt.sum(torch.stack([loss_sum, loss_sum.new_full((), stop.number)]))
        loss, stopping, norm = torch.cat([sums, norm[None]]).tolist()  # the one wait for the device in a step
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            skipped_in_a_row = 0
        else:
            skipped += 1
            # A loss scale that is too high is found out this way, and lowered; without one it is the run that is ill.
            skipped_in_a_row += not scaler.is_enabled() or scaler.get_scale() <= 1
            say(f"step {step + 1:,} skipped, no. {skipped:,} of the run: loss {loss}, gradient norm {norm}")
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise diverged(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, first_sequence, steps_since = step + 1, first_sequence + sequences_per_step, steps_since + 1

        # -- report
        if step % s.log_interval == 0 or step == max_iters:
            seconds = (time.perf_counter() - since) / steps_since
            since, steps_since = time.perf_counter(), 0
            speeds.append(seconds)
            speed = tokens_per_step / seconds
            mfu = speed * flops / peak if peak else None
            left = int((max_iters - step) * sorted(speeds)[len(speeds) // 2])  # seconds
            row = {"step": step, "tokens": step * tokens_per_step, "epoch": first_sequence / sequences_per_epoch}
            row |= {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_sec": speed, "mfu": mfu}
            line = f"step {step:,}/{max_iters:,} | epoch {row['epoch']:.2f} | loss {loss:.4f} | lr {rate:.2e} | "
            line += f"norm {norm:.2f} | {speed:,.0f} tokens/s | " + (f"MFU {mfu:.1%} | " if peak else "")
            if scaler.is_enabled():
                row |= {"loss_scale": scaler.get_scale(), "skipped_steps": skipped}
                line += f"scale {row['loss_scale']:.0f}, {skipped:,} skipped | "
            say(f"{line}{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")

    # ---- the end ----
    interrupted = stopping and not ended()
    if master:
        writer.finished(wait=True)
        if saved_at != step:
            save("ckpt.pt")
            writer.finished(wait=True)
        if saved_at != step:
            raise config.UserError(f"the last steps are not saved: make room in {out}, and the same command goes on")
        if not interrupted:
            save("final.pt")
            writer.finished(wait=True)
            if not (out / "final.pt").exists():
                raise config.UserError(f"final.pt is not written: make room in {out}, and the same command writes it")
    runtime.leave_processes()  # the others need not wait for an upload
    if master:
        wandb.finish()
    if interrupted:
        say(f"stopped by a signal after step {step:,}; the same command goes on from {last}")
        return 128 + (stop.number or signal.SIGTERM)
    if step < max_iters:
        say(f"no better validation loss than {best_val_loss:.4f} in {worse} evaluations")
    say(f"finished {step:,} steps; python sample.py --out_dir={s.out_dir}")
    return 0


if __name__ == "__main__":
    config.run(main, checkpoint.CheckpointError, data.DataError, runtime.RuntimeChoiceError)
