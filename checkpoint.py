"""Checkpoints: write, verify, find; and open any model: ours, nanoGPT's, a GPT-2 name, a Hugging Face folder.

A checkpoint is a dict of plain containers, numbers, strings and tensors, so that loading one runs no code. nanoGPT's
keys hold what they hold there: model, optimizer, model_args, iter_num, best_val_loss, config. Ours stand beside them:
format, n_inner, scaler, sequence_index, skipped_steps, worse_evaluations, row, tokenizer, data_sha256, wandb_run_id.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig, model_args

FORMAT = 1
KINDS = {"model": dict, "model_args": dict, "config": dict, "format": int, "iter_num": int, "tokenizer": str}
KINDS |= {"best_val_loss": (int, float, torch.Tensor)}  # nanoGPT's is a tensor
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class CheckpointError(ValueError):
    """A checkpoint or a model that is missing, broken or of another kind. The message is one line with the remedy."""


def save(path, checkpoint, links=()):
    """Write a checkpoint so that `path` is at every instant the old file or the new one, whole. Raises OSError.

    `links` are further names of the file; they keep it when `path` is written again.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        for link in links:
            link.unlink(missing_ok=True)
            try:
                os.link(partial, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(partial, link.with_name(link.name + ".partial"))
                os.replace(link.with_name(link.name + ".partial"), link)
        os.replace(partial, path)
    except RuntimeError as error:  # torch's writer speaks over what the system said, such as a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(f"writing {path} failed: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    sync_folder(path.parent)


def descriptor(path):
    """The open file that /dev/stdout, /dev/stderr or /dev/fd/N stands for, by its number; None for another path."""
    found = re.fullmatch(r"/dev/(?:(stdout|stderr)|fd/(\d+))", str(path))
    return found and int(found[2] or {"stdout": 1, "stderr": 2}[found[1]])


def in_place(path):
    """Whether a text is written to what `path` is already, such as /dev/null, and does not take its place."""
    return descriptor(path) is not None or path.exists() and not path.is_file()


def write_text(path, text):
    """Replace a text file whole; write to what is no file. Raises OSError."""
    if in_place(path):
        number = descriptor(path)  # opened anew by its name, a file would be written from its beginning
        with open(path if number is None else number, "w", encoding="utf-8", closefd=number is None) as f:
            f.write(text)
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder):
    """Make a rename in this folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Writer:
    """Writes checkpoints, one after the other. What lies on a GPU is copied, and written while the training goes on.

    A write's `written(error)` is called in the caller's thread by a later write() or finished(): error is None or an
    OSError. At the end of a `with` all that was given is on the disk.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1), deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(wait=True)

    def write(self, path, checkpoint, links, written):
        background = self.in_background(checkpoint)
        while len(self.pending) > 1:  # two copies may wait: of a run, and of its best weights
            self.report()
        state = to_host(checkpoint, {}) if background else checkpoint
        self.pending.append((self.pool.submit(save, path, state, links), written))
        self.finished(wait=not background)

    def in_background(self, checkpoint):
        return any(tensor.is_cuda for tensor in checkpoint["model"].values())

    def finished(self, wait=False):
        """Report the writes that are done; all of them, if need be after waiting for them."""
        while self.pending and (wait or self.pending[0][0].done()):
            self.report()

    def report(self):
        future, written = self.pending.popleft()
        if (error := future.exception()) and not isinstance(error, OSError):
            raise error
        written(error)


def to_host(value, copies):
    """A copy of what a checkpoint holds in the host's memory; a tensor that stands in it twice is copied once."""
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.shape
        if key not in copies:
            copies[key] = value.to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {k: to_host(v, copies) for k, v in value.items()}
    return [to_host(v, copies) for v in value] if isinstance(value, list) else value


def load(path):
    """A checkpoint's dict, on the CPU. Raises CheckpointError unless every byte is as it was written."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        # torch.load does not look at the archive's checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror or error}); it may be whole") from None
    except Exception as error:  # whatever zipfile meets in damaged bytes
        damaged = str(error) or type(error).__name__
    if damaged:
        others = ", ".join(p.name for p in sorted(path.parent.glob("ckpt*.pt")) if p != path) or "none"
        raise CheckpointError(
            f"{path} is damaged ({damaged}); go back to another by --resume_from=PATH (beside it: {others}), or start "
            "anew by --overwrite=True"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler meets in a file that is not a checkpoint
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path} is not a checkpoint of plain data ({reason}); it was not opened") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise CheckpointError(f"{path} holds no model and model_args: it is not a checkpoint of ours or nanoGPT's")
    wrong = [k for k, kinds in KINDS.items() if k in checkpoint and not isinstance(checkpoint[k], kinds)]
    if wrong:
        raise CheckpointError(f"{path} is none of ours or nanoGPT's: its {wrong[0]} is of another kind")
    if checkpoint.get("format", FORMAT) > FORMAT:
        raise CheckpointError(f"{path} was written by a newer version of this program; update this one")
    return checkpoint


def weights(model):
    """The entries of a checkpoint that describe a model."""
    return {"model": model.state_dict(), "model_args": model_args(model.config), "n_inner": model.config.n_inner}


def build(checkpoint, path):
    """The model that a checkpoint's dict holds. Raises CheckpointError where its weights do not fit its shape."""
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"], n_inner=checkpoint.get("n_inner", 0)))
        # The wrappers of torch.compile and DDP leave prefixes in nanoGPT's files, its older attention a mask.
        state = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in checkpoint["model"].items()}
        model.load_state_dict({k: v for k, v in state.items() if not k.endswith(".attn.bias")})
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path}: its weights do not fit its model_args ({reason})") from None
    return model


def of_run(out_dir):
    """The checkpoints of a run to sample from or to evaluate, the preferred one first: the best, else the last."""
    files = [Path(out_dir, name) for name in ("best.pt", "ckpt.pt", "final.pt")]
    return [p for p in files if p.is_file()]


def newest_run(root="out"):
    """The folder under `root`, or `root` itself, that was saved to last. Raises CheckpointError for none."""
    saved = [p for folder in (Path(root), *Path(root).glob("*/")) for p in of_run(folder)]
    if not saved:
        raise CheckpointError(f"there is no run under {root}/; train one, or name a model by --init_from=")
    return max(saved, key=lambda p: p.stat().st_mtime).parent


@dataclass
class Opened:
    """A model to start from, to sample from or to evaluate."""

    model: GPT
    name: str  # where it came from, for people
    path: Path | None  # its checkpoint file
    tokenizer: str  # its tokenizer's spec; "" in nanoGPT's, whose dataset tells
    dataset: str  # the dataset it was trained on; "" where it is not known
    iter_num: int


def open_run(out_dir="", init_from=""):
    """The model of a script that uses one: init_from if it names one, else the run in out_dir, else the newest run."""
    if init_from and init_from != "resume":
        return open_model(init_from)
    folder = Path(out_dir) if out_dir else newest_run()
    if not (files := of_run(folder)):
        raise CheckpointError(f"there is no checkpoint in {folder}; train first, or name a model by --init_from=")
    return open_model(files[0])


def open_model(source):
    """Open a checkpoint file, a run's folder, a Hugging Face folder, or a GPT-2 name on the hub, as an Opened.

    Raises CheckpointError where there is no such model or it cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        if not (files := of_run(path)):
            raise CheckpointError(f"{path} holds neither a checkpoint nor a Hugging Face config.json")
        path = files[0]
    if path.is_file():
        checkpoint = load(path)
        model, run = build(checkpoint, path), checkpoint.get("config", {})
        spec, dataset = checkpoint.get("tokenizer", ""), run.get("dataset", "")
        return Opened(model, str(path), path, spec, dataset, checkpoint.get("iter_num", 0))
    if (
        not path.is_dir()
        and str(source) not in GPT2_NAMES
        and (path.suffix == ".pt" or str(source).count("/") != 1 or path.parent.is_dir())
    ):
        raise CheckpointError(
            f"{str(source)!r} is no checkpoint, folder, {', '.join(GPT2_NAMES)} or OWNER/NAME on the hub"
        )
    repo = f"openai-community/{source}" if str(source) in GPT2_NAMES else str(source)
    try:
        model = GPT.from_huggingface(repo)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source} cannot be opened: {reason}; without a network, give a checkpoint or a folder"
        ) from None
    V = model.config.vocab_size
    guess, named = {50257: "gpt2", 257: "bytes"}.get(V), None
    if path.is_dir():  # export.py says which
        named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("tokenizer_spec")
    if named is None and guess and source not in GPT2_NAMES and os.environ.get("RANK", "0") == "0":
        print(f"{source}: by its {V:,} ids it is taken to have the tokenizer {guess!r}", file=sys.stderr)
    return Opened(model, str(source), None, str(named or guess or f"of {source}, which has {V:,} ids,"), "", 0)
