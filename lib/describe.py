"""run.json: what a run was. Everything in it is for people and for plot.py; no program goes on from it."""

import json
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lib.clock import clock_time

import torch

ROOT = Path(__file__).parent.parent


def beginning(s, rt, dataset, model, state):
    """What is known of a run when it begins, or when a command goes on with it: a dict for run.json."""
    versions = {name: version(name) for name in ("torch", "numpy")} | {"python": platform.python_version()}
    return {
        "command": sys.argv,
        "settings": asdict(s),
        "versions": versions,
        "commit": commit(),
        "machine": {"device": device_name(rt), "system": platform.platform(), "processes": rt.world_size},
        "data": {
            "dataset": dataset.name,
            "sha256": dataset.checksums["train"],
            "tokens": dataset.size("train"),
        },
        "parameters": model.num_params(),
        "first_step": state.step,  # A new run by --resume_from begins at its checkpoint's step.
        "started": now(),
        "ended": None,
    }


def origin(path):
    """When and at which step the run of a run.json began; now and at 0, where the file does not say."""
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        then = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(then["started"], str):
            step = then.get("first_step")
            return {"started": then["started"], "first_step": step if type(step) is int else 0}
    return {"started": now(), "first_step": 0}


def outcome(rows, first_step, state, rt):
    """What a run has come to, by its State and the rows of metrics.jsonl: a dict for run.json.

    seconds is the time of the training steps after first_step, without evaluations and saving.
    """
    timed = [row for row in rows if row.get("tokens_per_sec") and row["step"] > first_step]
    first = first_step * timed[0]["tokens"] // timed[0]["step"] if timed else 0  # tokens before that step
    before = [first, *(row["tokens"] for row in timed)]
    seconds = sum((row["tokens"] - last) / row["tokens_per_sec"] for last, row in zip(before, timed, strict=False))
    trained = before[-1] - first

    def last(key):
        return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)

    losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    return {
        "step": state.step,
        "tokens": last("tokens"),
        "seconds": seconds,
        "tokens_per_sec": trained / seconds if seconds else None,
        "peak_memory": peak_memory(rt),
        "best_val_loss": min(losses, default=None),
        "final_val_loss": last("val_loss"),
        "final_loss": last("loss"),
        "ended": now(),
    }


def summary(outcome):
    """The few figures of an outcome that one looks for first, as a line."""
    parts = [f"{clock_time(round(outcome['seconds']))} of training"]
    parts += [f"{outcome['tokens_per_sec']:,.0f} tokens/s"] if outcome["tokens_per_sec"] else []
    parts += [f"{outcome['peak_memory'] / 1e9:.2f} GB"] if outcome["peak_memory"] else []
    parts += [f"loss {outcome['final_loss']:.4f}"] if outcome["final_loss"] is not None else []
    if outcome["final_val_loss"] is not None:
        parts += [f"val loss {outcome['final_val_loss']:.4f}, the best {outcome['best_val_loss']:.4f}"]
    return " | ".join(parts)


def read_rows(path):
    """The rows of a metrics.jsonl that are whole, which have numbers or null alone; none where there is no file."""
    rows = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                is_row = isinstance(row, dict) and all(v is None or type(v) in (int, float) for v in row.values())
                rows += [row] if is_row and None not in (row.get("step"), row.get("tokens")) else []
    return rows


def now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit():
    """The commit of these sources, with a + where they were changed since; None outside a git checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None


def device_name(rt):
    """The name of the GPU, or of the processor where the system tells it."""
    if rt.device.type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(rt):
    """The most memory that this command has taken, in bytes, of the GPU if it used one. None where it is not known."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated(rt.device)
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
