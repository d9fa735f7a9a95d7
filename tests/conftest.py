"""What several test files share: the scripts run in this process, on a corpus of a few kilobytes."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import config
import data
import runtime

WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "that",
    "it",
    "was",
    "he",
    "his",
    "with",
    "as",
    "had",
    "for",
    "you",
    "not",
    "be",
    "her",
    "at",
    "on",
    "by",
    "which",
    "she",
    "all",
]


def text(documents, seed=0, words=60):
    """Documents of pseudo-random words in lines: enough structure that a loss falls."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(documents):
        drawn = [WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator)]
        yield "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, words, 10)) + "\n"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A working directory with data/tiny (bytes; train, val, test)."""
    monkeypatch.chdir(tmp_path)
    pieces = [(split, doc, True) for split, n in (("train", 40), ("val", 5), ("test", 4)) for doc in text(n, seed=n)]
    data.write("tiny", data.BytesTokenizer(), pieces, sum(len(p[1]) for p in pieces))
    return tmp_path


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train", "--key=value", ...) runs train.py's main() here: (exit status, stdout, stderr)."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices

    def call(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        status = 0
        try:
            module = importlib.import_module(name)
            config.run(module.main, checkpoint.CheckpointError, data.DataError, runtime.RuntimeChoiceError)
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


def rows(out):
    """What a run has logged."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def same_final_weights(a, b):
    """Whether two runs ended at the same bits."""
    a, b = (checkpoint.load(Path(out, "final.pt"))["model"] for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


TINY = [
    "--dataset=tiny",
    "--block_size=16",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--dropout=0.2",
    "--learning_rate=1e-2",
    "--min_lr=1e-3",
    "--warmup_iters=2",
    "--max_iters=12",
    "--eval_interval=4",
    "--log_interval=1",
    "--device=cpu",
    "--compile=False",
]


@pytest.fixture
def train(script, corpus):
    """train("--out_dir=out/a", ...) trains a tiny model for 12 steps with dropout and accumulation."""
    return lambda *args: script("train", *TINY, *args)
