"""auto_batch_size=True: the micro-batches that this machine trains fastest with, found by trying."""

import time

from lib import runtime

import torch

MOST = 65_535  # sequences that GPUs' attention takes at once
LIMIT = 20.0  # seconds for the trials on a CPU
KEPT_FREE = 0.05  # share of a GPU's memory that evaluations and other programs may need


def choose_batch_size(model, s, start, rt):
    """With s.auto_batch_size split the sequences of a step, s.batch_size * s.gradient_accumulation_steps, anew.

    A run that goes on keeps what was found when it began, since micro-batches of another size draw another dropout.
    On a GPU these are the largest that fit, and elsewhere the fastest. Their size divides each process's share, and all
    processes take the smallest that one of them has found. Gradients are dropped.
    """
    if not s.auto_batch_size or start.keeps_batch_size or s.eval_only:
        return
    sequences = s.batch_size * s.gradient_accumulation_steps
    share = sequences // rt.world_size
    memory = rt.memory() or float("inf")
    sizes = [n for n in range(1, min(share, MOST) + 1) if share % n == 0]
    sizes = [n for n in sizes if n == 1 or runtime.least_memory(model.config, s, rt, n) <= memory]
    on_gpu = rt.device.type == "cuda"
    batch_size = min(rt.gather((largest if on_gpu else fastest)(model, sizes, s, rt)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(rt.device)  # The peak of the run is not that of the trials.
    s.batch_size, s.gradient_accumulation_steps = batch_size, sequences // batch_size
    why = "the largest that fits" if on_gpu else "the fastest tried"
    masks = "; another size would draw other dropout" if s.dropout else ""
    rt.say(f"batch_size {batch_size:,}, {why}; micro-batches in a step: {s.gradient_accumulation_steps:,}{masks}")


def run(model, batch_size, s, rt):
    """Forward and backward pass of one micro-batch."""
    x = torch.zeros(batch_size, s.block_size, dtype=torch.long, device=rt.device)
    try:
        with rt.autocast():
            _, loss = model(x, x)
        loss.backward()
        loss.item()  # This waits for a Mac's GPU.
    finally:
        model.zero_grad(set_to_none=True)


def largest(model, sizes, s, rt):
    """The largest of the sizes at which a micro-batch fits beside the optimizer's moments; else the smallest."""
    parameters = sum(p.numel() for p in model.parameters())
    # A trial has no gradients yet. The second micro-batch of a step has those of the first one.
    room = int(rt.memory() * KEPT_FREE) + (4 + runtime.bytes_beside_gradient(rt)) * parameters
    return next((size for size in reversed(sizes) if fits(model, size, room, s, rt)), sizes[0])


def fits(model, size, room, s, rt):
    """Whether a micro-batch of so many sequences fits beside `room` bytes."""
    try:
        reserve = torch.empty(room, dtype=torch.uint8, device=rt.device)
        run(model, size, s, rt)
        del reserve
        return True
    except Exception as error:
        if not runtime.is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()


def fastest(model, sizes, s, rt):
    """The size with the least time a sequence, of those up to the first that is a tenth slower than the best before."""
    began, best, seconds = time.perf_counter(), 0, float("inf")
    run(model, sizes[0], s, rt)  # This warms up.
    for size in sizes:
        times = []
        try:
            for _ in range(2):  # The shorter of two counts, since other programs disturb.
                start = time.perf_counter()
                run(model, size, s, rt)
                times.append(time.perf_counter() - start)
        except Exception as error:  # A Mac's GPU may be full.
            if not (best and runtime.is_out_of_memory(error)):
                raise
            break
        each = min(times) / size
        if each < seconds:
            best, seconds = size, each
        if each > 1.1 * seconds or time.perf_counter() - began > LIMIT:
            break
    if rt.device.type == "mps":
        torch.mps.empty_cache()
    runtime.give_back_freed_memory()  # The largest trial has left far more than the training takes.
    return best
