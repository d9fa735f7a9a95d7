"""Train GPT-2 on data/DATASET, or go on with the run in out_dir.

    python train.py config/demo.py
    python train.py config/wikitext103.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/wikitext103.py

Later wins: the defaults below, then config files, then --KEY=VALUE.
"""

import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import config
import data
import runtime
from model import GPT, GPTConfig


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
    # optimizer: AdamW
    learning_rate: float = 6e-4  # the highest
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # decay of the gradients' mean
    beta2: float = 0.95  # decay of the gradients' mean square
    grad_clip: float = 1.0  # norm to clip gradients at; 0 is off
    # learning rate and length
    max_iters: int = 600_000  # steps
    max_epochs: float = 0.0  # passes over the train split, instead of max_iters; 0 is off
    decay_lr: bool = True  # cosine from learning_rate to min_lr; else constant after the warm-up
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 0  # the step at which the rate reaches min_lr; 0 is the last
    min_lr: float = 6e-5  # the lowest
    # evaluation, logs, checkpoints
    eval_interval: int = 2000  # steps between evaluations, each with a checkpoint; 0 is never
    eval_iters: int = 0  # batches of the validation split in an evaluation, always the same; 0 is the whole split
    eval_only: bool = False  # evaluate once and write nothing
    log_interval: int = 10  # steps between lines of the log
    always_save_checkpoint: bool = True  # else an evaluation saves only what is better than before
    save_interval: int = 0  # steps between ckpt_iter_N.pt, which are kept; 0 is off
    save_epochs: int = 0  # epochs between ckpt_epoch_N.pt, which are kept; 0 is off
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile
    backend: str = "nccl"  # of several processes on GPUs; on a CPU it is gloo


# Whatever else differs at a resume is printed and takes effect.
MUST_AGREE = ("block_size", "n_layer", "n_head", "n_embd", "n_inner", "bias", "seed")
MAY_DIFFER_UNSAID = ("out_dir", "init_from", "resume_from", "overwrite", "eval_only")
# A run of so many steps with a non-finite loss or gradient is not going to recover.
MAX_SKIPPED_IN_A_ROW = 5


def check(s):
    config.check(
        s,
        positive="batch_size block_size gradient_accumulation_steps n_layer n_head n_embd max_iters log_interval",
        not_negative="n_inner learning_rate weight_decay grad_clip max_epochs warmup_iters lr_decay_iters min_lr "
        "eval_interval eval_iters save_interval save_epochs seed",
        fraction="dropout beta1 beta2",
    )
    if s.n_embd % s.n_head:
        raise config.UserError(f"n_embd={s.n_embd} is not divisible by n_head={s.n_head}; change one of them")


def learning_rate_at(step, s, max_iters):
    """The rate of a step, counted from 0: linear warm-up, then cosine from learning_rate to min_lr, then min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    last = s.lr_decay_iters or max_iters
    if step >= last:
        return s.min_lr
    progress = (step - s.warmup_iters) / max(1, last - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


def micro_batches(tokens, s, rt, step, first_sequence):
    """The micro-batches of this process from `step` on, each (its index in the step, inputs, targets) on the device."""
    for at in itertools.count():
        for micro in range(rt.rank, s.gradient_accumulation_steps, rt.world_size):
            sequence = first_sequence + (at * s.gradient_accumulation_steps + micro) * s.batch_size
            yield micro, *rt.to_device(*data.batch(tokens, s.block_size, s.seed, sequence, s.batch_size))


def one_ahead(items):
    """The same items; the next one is made before the one in hand is used, so that a GPU never waits for it."""
    ready = next(items)
    for following in items:
        yield ready
        ready = following


def evaluate(model, ids, s, rt):
    """Mean loss in nats over the targets of the `stream` windows of `ids`, shared out among the processes."""
    windows = data.stream_windows(len(ids), s.block_size)
    batches = [windows[i : i + s.batch_size] for i in range(0, len(windows), s.batch_size)]
    if 0 < s.eval_iters < len(batches):  # spread over the split
        batches = [batches[i * len(batches) // s.eval_iters] for i in range(s.eval_iters)]
    total = torch.zeros(2, dtype=torch.float64)  # negative log-likelihood, tokens
    model.eval()
    for part in batches[rt.rank :: rt.world_size]:
        part = part + [(0, 1, 1)] * (s.batch_size - len(part))  # windows of nothing: one shape, compiled once
        x, y = rt.to_device(*data.window_batch(ids, part, s.block_size))
        with rt.autocast():
            nll = model.nll(x, y)
        total += torch.tensor([nll.double().sum().item(), len(nll)])
    model.train()
    nll, scored = rt.sum(total.to(rt.device) if rt.device.type == "cuda" else total).tolist()
    return nll / scored


def run_to_resume(s):
    """The checkpoint that this command goes on from, or None where it starts a run."""
    last = Path(s.out_dir, "ckpt.pt")
    if s.eval_only and s.init_from != "resume":
        return None
    if s.init_from == "resume" and not last.exists():
        raise config.UserError(f"init_from=resume: there is no {last} to resume; check out_dir, or start from scratch")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a failure
    if s.overwrite and not restarted:
        return None
    if s.resume_from:
        # The command that went back there before, and was cut off since, goes on from where it came to.
        if last.exists() and checkpoint.load(last).get("config", {}).get("resume_from") == s.resume_from:
            return last
        return Path(s.resume_from)
    return last if last.exists() else None


def check_agreement(ckpt, path, s, data_sha256):
    """Raise UserError where a checkpoint cannot be gone on with under these settings; print what else differs."""
    if "format" not in ckpt:
        raise config.UserError(
            f"{path} is nanoGPT's, which does not say where in the data it was; start a new run from its weights: "
            f"--init_from={path} and another --out_dir"
        )
    then, now = ckpt["config"], asdict(s)
    tokens = [c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"] for c in (then, now)]
    pairs = {key: (then.get(key), now[key]) for key in MUST_AGREE} | {"tokens a step": tuple(tokens)}
    wrong = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
    if ckpt["data_sha256"] != data_sha256:
        wrong.append(f"the tokens of data/{s.dataset}/train.bin are others")
    if wrong:
        raise config.UserError(
            f"{path} can't be resumed: {'; '.join(wrong)}; take it back, or start a run by another --out_dir or "
            "--overwrite=True"
        )
    return [f"{k} {then[k]} -> {v}" for k, v in now.items() if k not in MAY_DIFFER_UNSAID and then.get(k, v) != v]


def keep_rows_until(path, step):
    """Drop the rows of metrics.jsonl past a step, and a last one cut short; whole rows only, none twice."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def main():
    s = config.load(Settings)
    check(s)

    # ---- data, before the processes form a group: the first of a machine may prepare for an hour ----
    data.ensure(s.dataset)
    dataset = data.Dataset(s.dataset)
    tokens = dataset.tokens("train")
    blocks = data.blocks_per_epoch(len(tokens), s.block_size)  # sequences in an epoch
    sequences = s.batch_size * s.gradient_accumulation_steps  # in a step
    max_iters = math.ceil(s.max_epochs * blocks / sequences) if s.max_epochs else s.max_iters
    data_sha256 = dataset.verify("train")
    val_ids = dataset.text_ids("val") if "val" in dataset.paths else None
    if val_ids is not None and len(val_ids) < 2:
        raise config.UserError(f"{dataset.folder} has a val split of {len(val_ids)} tokens; prepare it with more text")
    if s.eval_only and val_ids is None:
        raise config.UserError(f"eval_only: {dataset.folder} has no val split")

    # ---- machine ----
    rt = runtime.choose(s.device, s.dtype, s.compile, training=True)
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
    say(f"{sequences * s.block_size:,} tokens a step, {blocks / sequences:,.1f} steps an epoch, {max_iters:,} steps")

    # ---- model: a run to go on with, or one to start ----
    torch.manual_seed(s.seed)
    ckpt, step, first_sequence, best_val_loss = None, 0, 0, math.inf
    if resume_path := run_to_resume(s):
        ckpt = checkpoint.load(resume_path)
        changes = check_agreement(ckpt, resume_path, s, data_sha256)
        model = checkpoint.build(ckpt, resume_path)
        step, first_sequence, best_val_loss = ckpt["iter_num"], ckpt["sequence_index"], ckpt["best_val_loss"]
        say(f"resuming {resume_path} at step {step:,}" + "".join(f"; {change}" for change in changes))
        if step >= max_iters and not s.eval_only:
            say(f"{s.out_dir} has finished its {max_iters:,} steps; raise max_iters, or start anew by --overwrite=True")
            return
    elif s.init_from in ("scratch", "resume"):
        shape = {k: getattr(s, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "n_inner")}
        model = GPT(GPTConfig(vocab_size=dataset.vocab_size, **shape))
    else:
        opened = checkpoint.open_model(s.init_from)
        model, spec = opened.model, opened.tokenizer or data.nanogpt_tokenizer(opened.dataset)
        if spec != dataset.tokenizer_spec:
            raise config.UserError(
                f"{s.init_from} has the tokenizer {spec[:40]!r}, data/{s.dataset} was made with "
                f"{dataset.tokenizer_spec[:40]!r}; prepare the data with the model's"
            )
        if s.block_size > (positions := model.config.block_size):
            raise config.UserError(f"{s.init_from} has {positions:,} positions; --block_size={positions} or less")
        if s.block_size < positions:
            model.crop_block_size(s.block_size)
            say(f"cropped the model's {positions:,} positions to {s.block_size:,}")
        say(f"starting from {opened.name}")
    model.set_dropout(s.dropout)
    model.to(rt.device).train()
    size, flops = model.num_params(), model.flops_per_token()
    say(f"{size / 1e6:.2f} M parameters without positions, {flops / 1e9:.3f} GFLOP a token")
    optimizer = torch.optim.AdamW(
        model.optim_groups(s.weight_decay), lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=rt.device.type != "mps"
    )
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
        for group, fresh in zip(optimizer.param_groups, model.optim_groups(s.weight_decay), strict=True):
            group["weight_decay"], group["betas"] = fresh["weight_decay"], (s.beta1, s.beta2)
        del ckpt
    if rt.compile:
        runtime.compile_blocks(model, rt, s.batch_size)

    if s.eval_only:
        say(f"step {step:,} | val loss {evaluate(model, val_ids, s, rt):.4f}")
        return

    # ---- the folder of the run ----
    out, metrics = Path(s.out_dir), None
    if master:
        out.mkdir(parents=True, exist_ok=True)
        if not resume_path:
            for old in [*out.glob("*.pt"), out / "metrics.jsonl"]:
                old.unlink(missing_ok=True)
        for stray in out.glob("*.partial"):  # of a write that was killed
            stray.unlink()
        keep_rows_until(out / "metrics.jsonl", step)
        metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")

    def record(row):
        if master:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

    def save(*file_names):
        """Write the state after `step` steps under the first name, and link it under the others."""
        if not master or not all(p.isfinite().all() for p in model.parameters()):
            return
        state = checkpoint.weights(model) | {
            "format": checkpoint.FORMAT,
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": asdict(s),
            "tokenizer": dataset.tokenizer_spec,
        }
        whole = {"optimizer": optimizer.state_dict(), "sequence_index": first_sequence, "data_sha256": data_sha256}
        weights_only = file_names[0] in ("best.pt", "final.pt")
        checkpoint.save(out / file_names[0], state if weights_only else state | whole)
        for other in file_names[1:]:
            shutil.copyfile(out / file_names[0], out / f"{other}.partial")
            os.replace(out / f"{other}.partial", out / other)

    # ---- the loop ----
    stop = runtime.StopSignal()
    batches = one_ahead(micro_batches(tokens, s, rt, step, first_sequence))
    skipped_in_a_row, speeds, row = 0, deque(maxlen=20), {}
    since, steps_since = time.perf_counter(), 0
    peak = rt.peak_flops() * rt.world_size
    evaluated = step if resume_path else -1
    while True:
        # -- evaluate, save: the state here is the one after `step` steps
        due = step == max_iters or (s.eval_interval and step % s.eval_interval == 0)
        if due and val_ids is not None and s.eval_interval and evaluated != step:
            began = time.perf_counter()
            val_loss, evaluated = evaluate(model, val_ids, s, rt), step
            better = val_loss < best_val_loss
            row |= {"step": step, "tokens": step * sequences * s.block_size, "val_loss": val_loss}
            say(f"step {step:,} | val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}")
            if better:
                best_val_loss = val_loss
                if step > 0:
                    save("best.pt")
            if 0 < step < max_iters and (better or s.always_save_checkpoint):
                save("ckpt.pt")
            since += time.perf_counter() - began  # neither counts as training time
        if row:
            record(row)
            row = {}
        if step == max_iters or stop.number:
            break

        # -- one step
        rate = learning_rate_at(step, s, max_iters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_sum = torch.zeros((), device=rt.device)
        for _ in range(mine):
            micro, x, y = next(batches)
            torch.manual_seed(data.seed_of(s.seed, step, micro))
            with rt.autocast():
                _, loss = model(x, y)
            (loss / mine).backward()
            loss_sum += loss.detach() / mine
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        loss, norm = torch.stack([loss_sum, norm]).tolist()  # the one time a step that we wait for the device
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            say(f"step {step + 1:,} skipped: loss {loss}, gradient norm {norm}")
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise config.UserError(
                    f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite; the last good checkpoint stands in {out}: "
                    "go on from it with a lower --learning_rate"
                )
        optimizer.zero_grad(set_to_none=True)
        step, first_sequence, steps_since = step + 1, first_sequence + sequences, steps_since + 1

        # -- report
        if step % s.log_interval == 0 or step == max_iters:
            seconds = (time.perf_counter() - since) / steps_since
            since, steps_since = time.perf_counter(), 0
            speeds.append(seconds)
            speed = sequences * s.block_size / seconds
            mfu = speed * flops / peak if peak else None
            left = time.strftime("%H:%M:%S", time.gmtime((max_iters - step) * sorted(speeds)[len(speeds) // 2]))
            row = {"step": step, "tokens": step * sequences * s.block_size, "epoch": first_sequence / blocks}
            row |= {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_sec": speed, "mfu": mfu}
            say(
                f"step {step:,}/{max_iters:,} | epoch {row['epoch']:.2f} | loss {loss:.4f} | lr {rate:.2e} | "
                f"norm {norm:.2f} | {speed:,.0f} tokens/s | " + (f"MFU {mfu:.1%} | " if peak else "") + f"{left} left"
            )
        if s.save_interval and step % s.save_interval == 0:
            save("ckpt.pt", f"ckpt_iter_{step}.pt")
        epoch, before = first_sequence // blocks, (first_sequence - sequences) // blocks
        if s.save_epochs and epoch // s.save_epochs > before // s.save_epochs:
            save("ckpt.pt", f"ckpt_epoch_{epoch}.pt")

    save("ckpt.pt")
    if stop.number and step < max_iters:
        say(f"stopped by signal {stop.number} after step {step:,}; the same command goes on from {out / 'ckpt.pt'}")
        sys.exit(128 + stop.number)
    save("final.pt")
    say(f"finished {max_iters:,} steps; python sample.py --out_dir={s.out_dir}")


if __name__ == "__main__":
    config.run(main, checkpoint.CheckpointError, data.DataError, runtime.RuntimeChoiceError)
