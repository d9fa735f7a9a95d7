"""Measure the scripts on this machine, each as a process of its own, beside what the hardware could do.

    python bench.py                                                GPT-2 124 M, steps of 1 or on a GPU 128 sequences
    python bench.py --peer=../nanoGPT                              and nanoGPT's train.py beside it, on the same data
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=16
    python bench.py --jobs=train --trace=trace.json                and where the time goes, for ui.perfetto.dev
    python bench.py --jobs=prepare --text='books/*.txt'

Jobs: prepare, train (AdamW), muon, dropout (AdamW with 0.1), largest and muon_largest (in the largest micro-batches
that fit, on a CPU the fastest), eval, sample, samples (eight at once), sample_float16 (rounded weights). The limits are
measured too. That of training and evaluation is the rate of the model's own matrix products. That of sampling is
reading all weights once for each token, of which sample.py saves some on a CPU. That of preparing is the tokenizer
alone. Nothing is downloaded: the text is Python's standard library, and the weights are those that train.py draws.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lib import files, settings
from lib.settings import UserError

import torch

ROOT = Path(__file__).parent.resolve()
TRAININGS = {
    "train": [],
    "muon": ["--optimizer=muon"],
    "dropout": ["--dropout=0.1"],
    "largest": ["--auto_batch_size=True"],
    "muon_largest": ["--optimizer=muon", "--auto_batch_size=True"],
}
SAMPLINGS = {"sample": (1, ""), "samples": (8, ""), "sample_float16": (1, "float16")}  # samples at once, precision
JOBS = ("prepare", *TRAININGS, "eval", *SAMPLINGS)
# A GPU needs more work than a CPU to be busy, and more steps to be timed.
DEFAULTS = {
    "cpu": dict(jobs=("prepare", "train", "eval", "sample"), batch_size=1, gradient_accumulation_steps=1, steps=5),
    "cuda": dict(jobs=JOBS, batch_size=16, gradient_accumulation_steps=8, steps=40),
}
WARM_UP = 2  # steps of training that do not count
WEIGHTS = "--init_from=out/final.pt"  # the weights alone, as best.pt has them


@dataclass
class Settings:
    jobs: tuple[str, ...] = ()  # jobs to measure, as a,b; '' is all on a GPU, and prepare,train,eval,sample elsewhere
    peer: str = ""  # a folder with nanoGPT's sources, whose training is measured too; '' is none
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    block_size: int = 1024  # tokens in a sequence
    batch_size: int = 0  # sequences in a micro-batch of training; 0 is 16 on a GPU and 1 elsewhere
    gradient_accumulation_steps: int = 0  # micro-batches in a step; 0 is 8 on a GPU and 1 elsewhere
    recompute: bool = False  # True computes each block again in the backward pass
    steps: int = 0  # steps of training that count, by their median rate; 0 is 40 on a GPU and 5 elsewhere
    eval_tokens: int = 8192  # tokens to evaluate
    max_new_tokens: int = 224  # tokens of each sample, after a prompt of 32
    text: str = ""  # a glob of UTF-8 files to prepare; '' is Python's standard library
    json: str = ""  # where the figures are written, - for standard output; '' is nowhere
    trace: str = ""  # where a profiler's trace of three steps of training is written; '' is nowhere
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16
    compile: Literal["auto", True, False] = "auto"  # auto, True, False: torch.compile in training


def check(s):
    settings.check(
        s,
        positive="n_layer n_head n_embd block_size eval_tokens max_new_tokens",
        not_negative="batch_size gradient_accumulation_steps steps",
        divisible="n_embd n_head",
    )
    if wrong := [job for job in s.jobs if job not in JOBS]:
        raise UserError(f"jobs={wrong[0]}: take one or more of {','.join(JOBS)}")
    if s.peer and not all(Path(s.peer, name).is_file() for name in ("train.py", "model.py", "configurator.py")):
        raise UserError(
            f"peer={s.peer} has no train.py, model.py and configurator.py; name a folder with nanoGPT's sources"
        )
    is_gpu = s.device.startswith("cuda") or s.device == "auto" and torch.cuda.is_available()
    for key, value in DEFAULTS["cuda" if is_gpu else "cpu"].items():
        setattr(s, key, getattr(s, key) or value)
    if s.trace and "train" not in s.jobs:
        raise UserError(f"trace={s.trace} is of training; add train to --jobs")
    if s.eval_tokens < 2:
        raise UserError(f"eval_tokens={s.eval_tokens}: the first one is not scored, so take 2 or more")
    if s.text and not any(map(os.path.isfile, glob.glob(s.text, recursive=True))):
        raise UserError(f"text={s.text} names no files; write a glob, such as 'books/*.txt'")
    if s.json:
        files.check_json(s.json)
    if s.trace:
        files.check_json(os.path.abspath(s.trace), "trace", holds="traceEvents")


# ---- processes ----


# This runs between bench.py and a script. The system counts a process's peak from that of the process that started it.
LAUNCH = """
import resource, subprocess, sys
status = subprocess.call([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
"""


def run(folder, *command, env=None):
    """Run Python with these arguments in a folder. Returns its output and its memory. Raises UserError where it fails.

    The output is [(seconds since the start, line)], the memory {"peak_memory": bytes}.
    """
    began, lines = time.perf_counter(), []
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))  # python -c finds lib/ there.
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
        process.wait()
    except BaseException:  # An interrupt ends the script too.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    _, peak = lines.pop()
    if process.returncode:
        words = map(Path, map(str, command))
        script = next((word.name for word in words if word.suffix == ".py" and word.is_file()), "python")
        raise UserError(f"{script} failed: {lines[-1][1] if lines else 'without a word'}")
    unit = 1 if sys.platform == "darwin" else 1024
    for _, line in lines:
        if "going on without it" in line:  # What could not be compiled would be measured as if it had been.
            print(line, flush=True)
    return lines, {"peak_memory": int(peak) * unit}


def find(pattern, lines):
    """The first group of the first line that `pattern` is found in."""
    return next(m for _, line in lines if (m := re.search(pattern, line)))[1]


def number(pattern, lines):
    return float(find(pattern, lines).replace(",", ""))


def first_step(lines):
    """Seconds from the start of a training to the end of its first step."""
    return next(seconds for seconds, line in lines if line.startswith("step 1/"))


# ---- limits ----


def best_seconds(work, device, seconds=2.0):
    """Seconds of the shortest run of work(), of those that fit into the time."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def matmul_rate(s, device, dtype, training):
    """FLOP/s of the largest product of a block: a micro-batch's (N, C) by the MLP's (C, 4 C)."""
    torch.backends.cuda.matmul.allow_tf32 = training  # As in lib/runtime.py. Only float32 heeds it.
    N, C = s.batch_size * s.block_size, s.n_embd
    x, w = (torch.randn(shape, device=device, dtype=dtype) for shape in ((N, C), (C, 4 * C)))
    return 8 * N * C * C / best_seconds(lambda: x @ w, device)


def bandwidth(device):
    """Bytes/s of adding up 2^27 numbers in float32, which no cache holds."""
    numbers = torch.ones(1 << 27, device=device)
    return numbers.numel() * numbers.itemsize / best_seconds(numbers.sum, device)


TOKENIZER_ALONE = """
import glob, os, sys, time
from lib import tokenizer
tok = tokenizer.load("gpt2").tiktoken
texts = [open(p, encoding="utf-8").read() for p in sorted(glob.glob(sys.argv[1], recursive=True)) if os.path.isfile(p)]
began = time.perf_counter()
ids = tok.encode_ordinary_batch(texts, num_threads=os.cpu_count())
print(f"alone {sum(map(len, ids)) / (time.perf_counter() - began):.0f} tokens/s")
"""

TRACED = """
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import profile
trace, first, last, sys.argv = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
profiler, steps = profile(), 0
def count(*_):
    global steps
    steps += 1
    if steps == first:
        profiler.start()
    if steps == last:
        profiler.stop()
register_optimizer_step_post_hook(count)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
profiler.export_chrome_trace(trace)
averages = profiler.key_averages()
by = "device" if any(e.self_device_time_total for e in averages) else "cpu"
print("where the time goes:")
print(averages.table(sort_by=f"self_{by}_time_total", row_limit=15, max_name_column_width=50))
"""


# ---- jobs: tokens_per_sec is what a script said, limit what the hardware would allow; memory is in bytes ----


def training(s, machine):
    """The command that trains the model."""
    keys = "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps recompute compile"
    fixed = ("--dataset=bench", "--eval_interval=0", "--log_interval=1", "--overwrite=True")
    return [ROOT / "train.py", *fixed, *(f"--{key}={getattr(s, key)}" for key in keys.split()), *machine]


def evaluation(s, folder, machine):
    part = folder / "data/part"  # Token ids without a meta.json are GPT-2's.
    part.mkdir()
    with open(folder / "data/bench/val.bin", "rb") as f:
        ids = f.read(2 * s.eval_tokens)
    if len(ids) < 2 * s.eval_tokens:
        raise UserError(f"eval_tokens={s.eval_tokens}: the text has {len(ids) // 2:,} for it; take fewer")
    (part / "val.bin").write_bytes(ids)
    lines, memory = run(folder, ROOT / "eval.py", WEIGHTS, "--dataset=part", "--protocol=stream", *machine)
    return {"tokens_per_sec": number(r"^([\d,]+) tokens/s", lines)} | memory


def sampling(s, folder, num_samples, dtype):
    prompt = "--start=" + 32 * " the"  # one token each
    lengths = [f"--num_samples={num_samples}", f"--max_new_tokens={s.max_new_tokens}"]
    machine = [f"--device={s.device}", f"--dtype={dtype}"]
    lines, memory = run(folder, ROOT / "sample.py", WEIGHTS, prompt, *lengths, *machine)
    return {"tokens_per_sec": number(r"tokens, ([\d.,]+) tokens/s", lines)} | memory


def training_rate(rows):
    """Tokens/s of the median step from the rows of metrics.jsonl, without the first steps."""
    return statistics.median(row["tokens_per_sec"] for row in rows if row["step"] > WARM_UP)


def peer_training(s, folder, machine):
    """Figures of nanoGPT's train.py with the same model, data and steps. It reads data/ and a file of its own there."""
    shutil.copy(Path(s.peer, "configurator.py"), folder)
    keys = "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps"
    command = [f"--{key}={getattr(s, key)}" for key in keys.split()] + machine
    command += [
        "--dataset=bench",
        "--out_dir=peer",
        "--bias=True",
        "--log_interval=1",
        f"--max_iters={WARM_UP + s.steps}",
    ]
    command += [
        "--eval_interval=1000000",
        "--eval_iters=1",
        f"--compile={s.compile in (True, 'auto') and 'cuda' in machine[0]}",
    ]
    lines, memory = run(folder, Path(s.peer, "train.py").resolve(), *command)
    times = [float(m[1]) / 1e3 for _, line in lines if (m := re.match(r"iter \d+: loss .*, time ([\d.]+)ms", line))]
    step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    return {"tokens_per_sec": step / statistics.median(times[WARM_UP:])} | memory


def measure(s, folder):
    """Do the jobs in s.jobs in a folder. Returns {job: its figures}."""
    text = os.path.abspath(s.text) if s.text else str(Path(sysconfig.get_path("stdlib"), "*.py"))
    machine, results = [f"--device={s.device}", f"--dtype={s.dtype}"], {}

    def done(job, figures):
        results[job] = figures
        print(f"{job}: {figures['tokens_per_sec']:,.0f} tokens/s", flush=True)

    lines, memory = run(folder, ROOT / "prepare_text.py", text, "--dataset=bench", "--val_fraction=0.1")
    if "prepare" in s.jobs:
        alone, _ = run(folder, "-c", TOKENIZER_ALONE, text)
        limit = {"limit": number(r"alone ([\d.]+)", alone), "limit_is": "the tokenizer alone"}
        done("prepare", {"tokens_per_sec": number(r"encoded in .* s, ([\d,]+) tokens/s", lines)} | limit | memory)
    if set(s.jobs) == {"prepare"}:
        return results

    # The first run is cold, and leaves the weights. The second finds what the first has compiled, and is measured.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    lines, _ = run(folder, *training(s, machine), "--max_iters=1", env=cache)
    why = find(r"^(device .*)", lines)
    print(why, flush=True)
    device, dtype = torch.device(find(r"device (\S+),", lines)), getattr(torch, find(r"dtype (\w+),", lines))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # synchronize() waits for this one.
    flops = number(r"([\d.e-]+) GFLOP a token", lines) * 1e9
    parameters = number(r"([\d.e-]+) M parameters", lines) * 1e6
    cold = first_step(lines)

    def products(operations, training):
        """The limit of a job with so many operations a token."""
        rate = matmul_rate(s, device, dtype, training)
        return {"limit": rate / operations, "limit_is": f"products at {rate / 1e12:.3g} TFLOP/s"}

    for job, changes in TRAININGS.items():
        if job not in s.jobs:
            continue
        command = [*training(s, machine), *changes, f"--max_iters={WARM_UP + s.steps}"]
        lines, memory = run(folder, *command, env=cache)
        rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
        figures = {"tokens_per_sec": training_rate(rows)} | products(flops, training=True) | memory
        if device.type == "cuda":
            peak = json.loads((folder / "out/run.json").read_text())["peak_memory"]
            figures |= {"peak_gpu_memory": peak, "mfu": statistics.median(row["mfu"] or 0 for row in rows[WARM_UP:])}
        if job == "train":  # The others compile something of their own.
            figures |= {"first_step_cold": cold, "first_step_warm": first_step(lines)}
        done(job, figures)
    if s.peer:
        # nanoGPT takes no auto.
        named = [f"--device={device}", f"--dtype={str(dtype).removeprefix('torch.')}"]
        done("nanoGPT", peer_training(s, folder, named) | products(flops, training=True))
    if s.trace:
        traced = ["-c", TRACED, os.path.abspath(s.trace), WARM_UP, WARM_UP + 3]
        command = [*traced, *training(s, machine), f"--max_iters={WARM_UP + 3}"]
        lines, _ = run(folder, *command, env=cache)
        begin = next(i for i, (_, line) in enumerate(lines) if line == "where the time goes:")
        print("\n".join(line for _, line in lines[begin:]))
    if "eval" in s.jobs:  # The forward pass is a third of the arithmetic of training.
        done("eval", evaluation(s, folder, machine) | products(flops / 3, training=False))
    for job, (count, rounded) in SAMPLINGS.items():
        if job in s.jobs:
            size = parameters * (2 if rounded else dtype.itemsize)  # in bytes
            rate = bandwidth(device)
            limit = {"limit": count * rate / size, "limit_is": f"{rate / 1e9:.3g} GB/s"}
            done(job, sampling(s, folder, count, rounded or s.dtype) | limit)
    return results


def table(results):
    head = ("job", "tokens/s", "limit", "share", "of", "MFU", "memory GB", "GPU GB", "first step s: cold", "warm")
    rows = [head]
    for job, f in results.items():
        mfu = f"{f['mfu']:.1%}" if f.get("mfu") else "-"
        sizes = [f"{f[k] / 1e9:.2f}" if f.get(k) else "-" for k in ("peak_memory", "peak_gpu_memory")]
        first = [f"{f[k]:.1f}" if k in f else "-" for k in ("first_step_cold", "first_step_warm")]
        share = f"{f['tokens_per_sec'] / f['limit']:.0%}"
        rows.append(
            (job, f"{f['tokens_per_sec']:,.0f}", f"{f['limit']:,.0f}", share, f["limit_is"], mfu, *sizes, *first)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def main():
    s = settings.load(Settings)
    check(s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # An orderly end leaves nothing behind.
    # With --json=- the report has standard output for itself.
    with contextlib.redirect_stdout(sys.stderr if s.json == "-" else sys.stdout):
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            results = measure(s, Path(folder))
        print(f"\n{table(results)}", flush=True)
    if s.json:
        files.write_json(s.json, {"torch": torch.__version__, "settings": asdict(s), "results": results})


if __name__ == "__main__":
    settings.run(main)
