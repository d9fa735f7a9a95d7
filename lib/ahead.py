"""What is ahead of a run, said before it begins: settings that do not fit each other, memory and time."""

import statistics
import sys
import time

from lib import runtime, settings
from lib.clock import duration, shorter


def smaller_batch(s):
    """What to do where memory is short: the settings that train the same in less, if there are any."""
    divisor = next((d for d in range(2, min(s.batch_size, 1000) + 1) if s.batch_size % d == 0), 0)
    if not divisor:
        other = "a smaller block_size or model" if s.recompute else "--recompute=True, or a smaller block_size or model"
        return f" with batch_size={s.batch_size}; no batch is smaller, so take {other}"
    accumulation = s.gradient_accumulation_steps * divisor
    same = f"--batch_size={s.batch_size // divisor} --gradient_accumulation_steps={accumulation}"
    same += " --auto_batch_size=False" * s.auto_batch_size
    masks = ", but for other dropout" * (s.dropout > 0)
    return f" with batch_size={s.batch_size}; {same} trains the same in less{masks}"


def warnings(s, max_iters, steps_per_epoch):
    """Lines on settings that are likely a slip. Each names a remedy."""
    lines = []
    if steps_per_epoch < 1:
        lines.append(
            f"a step reads more than the whole train split, {1 / steps_per_epoch:,.1f} times it; a smaller "
            "gradient_accumulation_steps, batch_size or block_size learns more from it"
        )
    elif max_iters / steps_per_epoch > 100:
        lines.append(
            f"the run reads the train split {max_iters / steps_per_epoch:,.0f} times; --max_epochs=10 is a usual "
            "length, and --patience=5 ends a run that gets no better"
        )
    intervals = [n for n in (s.eval_interval, s.save_interval) if n]
    if max_iters > 1000 and min(intervals, default=max_iters) >= max_iters and not s.save_epochs:
        lines.append(
            f"no checkpoint is written between the first and the last of {max_iters:,} steps; "
            f"--save_interval={max_iters // 5} keeps some"
        )
    if s.sample_tokens and not s.eval_interval:
        lines.append(f"sample_tokens={s.sample_tokens} follows evaluations, and eval_interval=0 makes none; set one")
    if s.decay_lr and 0 < s.lr_decay_iters <= s.warmup_iters and s.lr_schedule != "constant":
        lines.append(
            f"the warm-up of {s.warmup_iters:,} steps ends no sooner than the rate reaches min_lr, at lr_decay_iters="
            f"{s.lr_decay_iters}, so that it drops at once; --warmup_iters={s.lr_decay_iters // 20}"
        )
    if s.decay_lr and max_iters and s.warmup_iters >= max_iters:
        lines.append(
            f"the warm-up of {s.warmup_iters:,} steps is no shorter than the run of {max_iters:,}, so that the rate "
            f"does not reach learning_rate; --warmup_iters={max_iters // 20}"
        )
    return [f"warning: {line}" for line in lines]


def size(model, s, rt):
    """A line on a model and the memory of its training."""
    parameters, flops = model.num_params() / 1e6, model.flops_per_token() / 1e9
    memory = runtime.expected_memory(model.config, s, rt) / 1e9
    return f"{parameters:.5g} M parameters without positions, {flops:.4g} GFLOP a token, about {memory:.2g} GB"


def planned_iters(cls):
    """max_iters of this command without its --max_iters=0, for a script with the settings `cls`."""
    return settings.load(cls, [arg for arg in sys.argv[1:] if arg.replace("-", "_") != "__max_iters=0"]).max_iters


def estimate(micro_step, batches, accumulation, optimizer, max_iters, steps_per_epoch, clock, limit=10.0):
    """A line on the time of a step, an epoch and the whole. Weights do not change: the optimizer has a rate of 0.

    A step is measured by the median of its micro-batches: of all of them and at least five, or of those that fit into
    `limit` seconds, at least one. One more goes first and warms up.
    """
    seconds, began = [], time.perf_counter()
    clock.at("micro-batch", 0, 2)
    while len(seconds) < 2 or len(seconds) <= max(5, accumulation) and time.perf_counter() - began < limit:
        start = time.perf_counter()
        _, x, y = next(batches)
        micro_step(x, y).item()  # This waits for the device.
        seconds.append(time.perf_counter() - start)
        clock.at("micro-batch", min(2, len(seconds)), 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(2):  # The first time it makes its moments.
        start = time.perf_counter()
        optimizer.step()
        optimizer.param_groups[0]["params"][0].sum().item()  # This waits for the device.
        of_optimizer = time.perf_counter() - start
    step = accumulation * statistics.median(seconds[1:]) + of_optimizer
    line = f"a step takes about {duration(step)}, an epoch {duration(step * steps_per_epoch)}"
    line += f", the whole {duration(step * max_iters)} without evaluations" if max_iters else ""
    line += " and without what the processes send each other" * (clock.rt.world_size > 1)
    return line + shorter(step * max_iters)
