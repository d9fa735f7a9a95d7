"""Checkpoints: one file that is written whole, verified, and checked before use; and opening any model.

A checkpoint is a dict of plain containers, numbers, strings and tensors, so that loading one runs no code. nanoGPT's
keys hold what they hold there: model, optimizer, model_args, iter_num, best_val_loss, config. Ours stand beside them.
SCHEMA and RUN_SCHEMA list them all.
"""

import difflib
import glob
import math
import os
import re
import shutil
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lib import files, huggingface, settings, tokenizer
from lib.assemble import Diverged, assemble, is_plain
from lib.settings import UserError
from model import GPT, GPTConfig

import torch

FORMAT = 1
FOLDER_MARK = 0x10  # attribute of a zip archive's record that is a folder


# ---- writing ----


def save(path, checkpoint, links=()):
    """Write a checkpoint so that `path` is at every instant the old file or the new one, whole. Raises OSError.

    `links` are further names of the file. They keep it when `path` is written again.
    """
    path = Path(path)
    if path.is_symlink():
        file = Path(os.path.realpath(path))
        # The file may lie on a larger disk, and the link to it stays. One to a kept file or to another run's goes.
        if file.name == path.name and not file.with_name(".lock").exists():
            path = file
    try:
        with files.in_place_of(path) as partial:
            with open(partial, "xb") as f:
                torch.save(checkpoint, f)
                files.sync(f)
            for link in links:
                with files.in_place_of(link) as another:
                    try:
                        os.link(partial, another)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(partial, another)
    except RuntimeError as error:  # torch's writer hides what the system said, such as that the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(f"writing {path} failed: {error}") from None
    files.sync_folder(path.parent)


@dataclass
class Write:
    """A write that has ended."""

    path: Path
    links: list  # further names of the file
    about: object  # what the caller gave with it
    error: OSError | None  # why the older file still stands; None where the new one does


class Writer:
    """Writes checkpoints, one after the other. What lies on a GPU is copied, and written while the training goes on.

    Whoever writes asks by ended() what has become of it. At the end of a `with` all that was given is on the disk.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1), deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(wait=True)

    def write(self, path, checkpoint, links=(), about=None):
        """Begin a write. A checkpoint in the host's memory is written when this returns."""
        background = self.in_background(checkpoint)
        running = [future for *_, future in self.pending if not future.done()]
        if len(running) > 1:  # Memory is short, so two copies may wait: the run and its best weights.
            running[-2].exception()
        state = to_host(checkpoint, {}) if background else checkpoint
        future = self.pool.submit(save, path, state, links)
        self.pending.append((path, links, about, future))
        if not background:
            future.exception()

    def in_background(self, checkpoint):
        """Whether a checkpoint is written while the training goes on: where it lies on a GPU."""
        return any(tensor.is_cuda for tensor in checkpoint["model"].values())

    def ended(self, wait=False):
        """The Writes that have ended since the last call, in their order. `wait` first waits for the others."""
        ended = []
        while self.pending and (wait or self.pending[0][-1].done()):
            path, links, about, future = self.pending.popleft()
            if (error := future.exception()) and not isinstance(error, OSError):
                raise error
            ended.append(Write(path, links, about, error))
        return ended


def to_host(value, copies):
    """A copy, in the host's memory, of what a checkpoint holds. A tensor that stands in it twice is copied once."""
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.shape
        if key not in copies:
            copies[key] = value.to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {k: to_host(v, copies) for k, v in value.items()}
    return [to_host(v, copies) for v in value] if isinstance(value, list) else value


# ---- reading: everything in a file is checked before it is used ----


def is_count(value):
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value):
    return type(value) in (int, float) and abs(value) < math.inf


def is_text(value):
    return isinstance(value, str)


def is_loss(value):
    """A loss, or infinity where there was no evaluation yet. nanoGPT's is a tensor."""
    value = value.item() if is_plain(value) and value.numel() == 1 else value
    return is_count(value) or type(value) is float and value >= 0


def is_named(kind):
    """A test for a dict from texts to values of a kind."""
    return lambda value: isinstance(value, dict) and all(is_text(k) and kind(v) for k, v in value.items())


def is_setting(value):
    if isinstance(value, (list, tuple)):
        return all(map(is_text, value))
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def is_figure(value):
    """Whether a value is a figure of metrics.jsonl, which may be unknown or not finite."""
    return value is None or type(value) in (int, float)


def is_spec(value):
    try:
        tokenizer.check_spec(value)
    except ValueError:
        return False
    return True


# What a checkpoint may hold, ours or nanoGPT's, and a test of each. Only the first two are in all of them.
SCHEMA = {
    "model": is_named(is_plain),
    "model_args": is_named(is_setting),
    "n_inner": is_count,
    "format": is_count,
    "iter_num": is_count,
    "best_val_loss": is_loss,
    "config": is_named(is_setting),
    "tokenizer": is_spec,
    "val_sha256": is_text,
}
# What a whole checkpoint of ours holds besides: ckpt.pt and those that are kept.
RUN_SCHEMA = {
    "optimizer": is_named(lambda value: isinstance(value, (dict, list))),
    "scaler": is_named(is_number),
    "sequence_index": is_count,
    "skipped_steps": is_count,
    "worse_evaluations": is_count,
    "row": is_named(is_figure),
    "data_sha256": is_text,
    "wandb_run_id": is_text,
}


def load(path, remedy="--init_from=PATH takes another"):
    """A checkpoint's dict, on the CPU. Raises UserError unless every byte is as it was written and fits the schema.

    `remedy` says what to do about a damaged one, and is followed by the names of those beside it.
    """
    path = Path(path)
    if not path.is_file():
        inside = ", ".join(checkpoints_in(path))
        hint = f"it is a folder, name one of its files ({inside})" if inside else "check the path"
        raise UserError(f"there is no checkpoint {path}; {hint}")
    try:
        # torch.load does not look at the archive's checksums. It takes a record that is marked as a folder for empty.
        with zipfile.ZipFile(path) as archive:
            marked = (record.filename for record in archive.infolist() if record.external_attr & FOLDER_MARK)
            damaged = archive.testzip() or next(marked, None)
    except PermissionError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give yourself the right to read it") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}); it may be whole, so try again") from None
    except Exception as error:  # zipfile may meet anything in damaged bytes.
        damaged = str(error) or type(error).__name__
    if damaged:
        others = ", ".join(name for name in checkpoints_in(path.parent) if name != path.name) or "none"
        raise UserError(f"{path} is damaged ({damaged}); {remedy} (beside it: {others})")
    try:
        with warnings.catch_warnings(action="ignore"):  # What torch thinks of an odd tensor is not for the user.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # An unpickler may meet anything in a file that is not a checkpoint.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else settings.brief(error)
        raise UserError(f"{path} is not a checkpoint of plain data ({reason}); take another") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} holds no model and model_args: it is none of ours or nanoGPT's; take another")
    wrong = [key for key, fits in SCHEMA.items() if key in checkpoint and not fits(checkpoint[key])]
    if wrong:
        raise UserError(f"{path} is none of ours or nanoGPT's: its {wrong[0]} is of another kind; take another")
    if checkpoint.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path} was written by a newer version of this program; update this one")
    return checkpoint


def checkpoints_in(folder):
    """The names of the checkpoints in a folder, sorted."""
    return sorted(path.name for path in folder.glob("*.pt"))


def check_whole(checkpoint, path):
    """Raise UserError unless a loaded checkpoint has all that a run needs to go on."""
    if not {"format", "sequence_index"} <= checkpoint.keys():
        nanogpts = "is nanoGPT's, which does not say where in the data it was"
        what = "holds weights alone" if "format" in checkpoint else nanogpts
        raise UserError(f"{path} {what}; a new run starts from its weights by --init_from={path} and another --out_dir")
    for key, fits in (SCHEMA | RUN_SCHEMA).items():
        if key == "val_sha256" and key not in checkpoint:  # The first files of format 1 do not have it.
            continue
        if key not in checkpoint or not fits(checkpoint[key]):
            what = "is of another kind" if key in checkpoint else "is missing"
            raise UserError(f"{path} can't be resumed: its {key} {what}; take another checkpoint")


def weights(model):
    """The entries of a checkpoint that describe a model. nanoGPT's model_args know no n_inner."""
    args = asdict(model.config)
    return {"model": model.state_dict(), "n_inner": args.pop("n_inner"), "model_args": args}


def build(checkpoint, path):
    """The model that a checkpoint's dict holds. Raises UserError where its weights do not fit its shape."""
    try:
        if "n_head" not in checkpoint["model_args"]:  # No weight's shape tells it.
            raise ValueError("n_head is missing")
        config = GPTConfig(**checkpoint["model_args"], n_inner=checkpoint.get("n_inner", 0))
        # The wrappers of torch.compile and DDP leave prefixes in nanoGPT's files, and its older attention a mask.
        state = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in checkpoint["model"].items()}
        model = assemble(config, {k: v for k, v in state.items() if not k.endswith(".attn.bias")})
    except Diverged as error:
        raise UserError(f"{path}: {error}; take another") from None
    except (TypeError, ValueError) as error:
        reason = settings.brief(error)
        raise UserError(f"{path}: its weights do not fit its model_args ({reason}); take another") from None
    spec = checkpoint.get("tokenizer", "")
    if (ids := tokenizer.vocab_size_of(spec)) > config.vocab_size:
        raise UserError(f"{path} has {config.vocab_size:,} ids, its tokenizer {spec[:40]!r} {ids:,}; take another")
    return model


# ---- opening any model ----


def of_run(out_dir):
    """The checkpoints of a run that can be sampled from or evaluated. The best one comes before the last one."""
    paths = [Path(out_dir, name) for name in ("best.pt", "ckpt.pt", "final.pt")]
    return [p for p in paths if p.is_file()]


def runs():
    """The folders of runs under out/, and out/ itself where it is one."""
    return [folder for folder in (Path("out"), *Path("out").glob("*/")) if of_run(folder)]


def newest_run():
    """The run that was saved to last. Raises UserError for none."""
    saved = [p for folder in runs() for p in of_run(folder)]
    if not saved:
        raise UserError("there is no run under out/; train one, or name a model by --init_from=")
    return max(saved, key=lambda p: p.stat().st_mtime).parent


@dataclass
class Opened:
    """A model to start from, to sample from or to evaluate."""

    model: GPT
    name: str  # where it came from, for people
    path: Path | None  # its checkpoint file
    tokenizer: str  # its tokenizer's spec; '' for nanoGPT's, which only its dataset tells
    dataset: str  # the dataset it was trained on; '' where it is not known
    iter_num: int  # number of steps that it was trained


def open_run(out_dir="", init_from=""):
    """An Opened model: the one that init_from names, else that of the run in out_dir, else that of the newest run.

    Raises UserError where there is no such model or it cannot be read.
    """
    if init_from and init_from != "resume":
        return open_model(init_from)
    if out_dir.endswith(".pt") and os.path.isfile(out_dir):
        raise UserError(f"out_dir={out_dir} is a file; a checkpoint is opened by --init_from={out_dir}")
    folder = Path(out_dir) if out_dir else newest_run()
    if not (paths := of_run(folder)):
        named = {run.name: run for run in runs()}
        close = difflib.get_close_matches(folder.name, named, n=1)
        hint = f"did you mean {named[close[0]]}? Else " if close else ""
        raise UserError(f"there is no checkpoint in {folder}; {hint}train first, or name a model by --init_from=")
    return open_model(paths[0])


def names_in(source):
    """The models that --init_from names: one, or several with commas between them, or by a glob."""
    if os.path.exists(source):
        return [source]
    parts = [part for part in str(source).split(",") if part] or [source]
    return [name for part in parts for name in sorted(glob.glob(str(part))) or [part]]


def open_model(source):
    """Open what open_one() opens. Several of them, written a,b,c, are one model: the mean of their weights.

    Raises UserError where they have not the same shape and tokenizer.
    """
    first, *others = names_in(source)
    mean = open_one(first)
    datasets = {mean.dataset}
    for count, name in enumerate(others, start=2):
        other = open_one(name)
        # Only the dataset tells the tokenizer of nanoGPT's checkpoints.
        a, b = (asdict(m.model.config) | {"dropout": 0, "tokenizer": m.tokenizer or m.dataset} for m in (mean, other))
        if differ := ", ".join(key for key in a if a[key] != b[key]):
            raise UserError(f"{first} and {name} have no mean: they differ in {differ}; take checkpoints of one run")
        with torch.no_grad():
            for p, q in zip(mean.model.parameters(), other.model.parameters(), strict=True):
                p.lerp_(q, 1 / count)
        mean.iter_num = max(mean.iter_num, other.iter_num)
        datasets.add(other.dataset)
    if others:
        mean.name, mean.path = f"the mean of {', '.join([first, *others])}", None
        known = datasets - {""}
        mean.dataset = known.pop() if len(known) == 1 else ""
    return mean


def open_one(source):
    """Open a checkpoint file, a run's folder, a Hugging Face folder, or a name on the hub, as an Opened.

    Raises UserError where there is no such model or it cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        if not (paths := of_run(path)):
            raise UserError(f"{path} holds neither a checkpoint nor a Hugging Face config.json; name another")
        path = paths[0]
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path} is weights alone; --init_from={path.parent} opens them by the config.json beside them")
    if path.is_file():
        checkpoint = load(path)
        model, dataset = build(checkpoint, path), checkpoint.get("config", {}).get("dataset", "")
        if not is_text(dataset):
            raise UserError(f"{path} is none of ours or nanoGPT's: its dataset is of another kind; take another")
        return Opened(model, str(path), path, checkpoint.get("tokenizer", ""), dataset, checkpoint.get("iter_num", 0))
    known = huggingface.GPT2_NAMES
    may_be_on_hub = str(source) in known or str(source).count("/") == 1 and not path.parent.is_dir()
    if not path.is_dir() and (path.suffix == ".pt" or not may_be_on_hub):
        raise UserError(
            f"{str(source)!r} is no checkpoint or folder; check the path, or take {', '.join(known)} or OWNER/NAME"
        )
    model, spec = huggingface.load(source)
    V = model.config.vocab_size
    if not spec and (spec := next((name for name, t in tokenizer.TOKENIZERS.items() if t.vocab_size == V), "")):
        settings.say_once(f"{source}: by its {V:,} ids it is taken to have the tokenizer {spec!r}")
    return Opened(model, str(source), None, spec or f"{tokenizer.UNKNOWN}{source} has {V:,} ids", "", 0)
