"""Prepare your own UTF-8 text: the files that paths, folders and globs name become data/NAME.

    python prepare_text.py books/*.txt --dataset=books
    python prepare_text.py notes/ 'src/**/*.py' --dataset=mine --tokenizer=bytes
    python prepare_text.py stories.txt --dataset=stories --separator='<|endoftext|>'

A folder stands for every file in it that is not hidden. Each file is a document. With --separator, a document is the
text between two separators. Some documents are drawn for the validation split. A single document gives its last lines
instead. Train on the result by `python train.py --dataset=NAME`.
"""

import codecs
import glob
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib import data, prepare, settings, tokenizer
from lib.settings import UserError

import numpy as np


@dataclass
class Settings:
    path: tuple[str, ...] = ()  # files, folders and globs
    dataset: str = ""  # name of the folder under data/ to write; it must be given
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2 (byte pairs), bytes (one id for each byte)
    separator: str = ""  # text between two documents of a file, such as '<|endoftext|>'; '' is one document a file
    val_fraction: float = 0.01  # share of the bytes that goes to the validation split; 0 is no such split
    seed: int = 1337  # seed of the draw of the documents for the validation split
    threads: int = 0  # threads that encode; 0 is one for each core
    overwrite: bool = False  # True replaces an existing data/NAME


def find_files(arguments):
    """The files that paths, folders and globs name, in order. Each is listed once, and empty ones are left out."""
    files = {}
    for argument in arguments:
        paths = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise UserError(f"{argument}: there is no such file, folder or glob")
        for path in map(Path, paths):
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not hidden(p, path)]
            for each in inside if path.is_dir() else [path]:
                files.setdefault(each.resolve(), each)
    empty = [p for p in files.values() if p.stat().st_size == 0]
    if empty:
        settings.say(f"left out {len(empty)} empty files, such as {empty[0]}")
    if len(files) == len(empty):
        raise UserError("these paths hold no text; name files that do")
    return [p for p in files.values() if p.stat().st_size]


def hidden(path, folder):
    """Whether the file or a folder on the way to it from `folder` has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def mapped(path):
    """The bytes of a file as a memory map, so that a large file is not read into memory."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def document_spans(path, separator):
    """The offsets in bytes at which the documents of a file begin and end: int64 (n, 2). Empty ones are left out."""
    size = path.stat().st_size
    if not separator:
        return np.array([[0, size]])
    spans, mark = [], separator.encode("utf-8", "surrogateescape")
    with mapped(path) as text:
        begin = len(codecs.BOM_UTF8) if text[:3] == codecs.BOM_UTF8 else 0  # the byte-order mark of an editor
        while begin < size:
            at = text.find(mark, begin)
            end = at if at >= 0 else size
            # The line ends around a separator belong to it and not to the documents.
            first, last = begin, end
            while first < last and text[first] in b"\r\n":
                first += 1
            while last > first and text[last - 1] in b"\r\n":
                last -= 1
            if first < last:
                spans.append((first, last))
            begin = end + len(mark)
    return np.array(spans, np.int64).reshape(-1, 2)


def last_lines(path, span, fraction):
    """Cut the span of a single document in two at a line end. The second part has about `fraction` of its bytes."""
    begin, end = span
    with mapped(path) as text:
        near = end - int((end - begin) * fraction)
        line_ends = {text.rfind(b"\n", begin, min(near, end - 1)) + 1, text.find(b"\n", near, end - 1) + 1} - {0}
    if not line_ends:
        raise UserError(f"{path} is one line, which can't be split; name more files, or take --val_fraction=0")
    cut = min(line_ends, key=lambda at: abs(at - near))
    return np.array([[begin, cut], [cut, end]])


def draw_validation(sizes, fraction, seed):
    """Draw the documents of the validation split: bool (len(sizes),), True for at least one and never for all.

    `sizes` holds the bytes of each document.
    """
    chosen, budget, taken = np.zeros(len(sizes), bool), fraction * sizes.sum(), 0
    for i in np.random.default_rng(seed).permutation(len(sizes)):
        if taken + sizes[i] / 2 <= budget:
            chosen[i], taken = True, taken + sizes[i]
        if taken >= budget:
            break
    if not chosen.any():
        chosen[sizes.argmin()] = True
    if chosen.all():
        chosen[sizes.argmax()] = False
    return chosen


def main():
    s = settings.load(Settings, positional="path")
    settings.check(s, not_negative="seed threads", fraction="val_fraction")
    if not s.path:
        raise UserError("name the files, folders or globs to prepare; --help shows examples")
    if not s.dataset or s.dataset != Path(s.dataset).name or s.dataset.startswith("."):
        raise UserError(f"--dataset={s.dataset}: give the data a name, such as --dataset=books")
    with prepare.lock(s.dataset):
        if s.dataset in data.names() and not s.overwrite:
            raise UserError(f"data/{s.dataset} exists already; --overwrite=True replaces it")
        files = find_files(s.path)
        spans = [document_spans(path, s.separator) for path in files]
        if s.separator and all(mapped(path).find(s.separator.encode("utf-8", "surrogateescape")) < 0 for path in files):
            raise UserError(f"--separator={s.separator!r} is in none of these files; check its spelling")
        if sum(map(len, spans)) == 1 and s.val_fraction:
            i = next(i for i, of_file in enumerate(spans) if len(of_file))
            spans[i] = last_lines(files[i], spans[i][0], s.val_fraction)
            is_val = np.array([False, True])
        else:
            sizes = np.concatenate([of_file[:, 1] - of_file[:, 0] for of_file in spans])
            if not len(sizes):
                raise UserError("these files hold nothing but separators; name files with text")
            is_val = draw_validation(sizes, s.val_fraction, s.seed) if s.val_fraction else np.zeros(len(sizes), bool)

        def pieces():
            at = 0
            for path, of_file in zip(files, spans, strict=True):
                for begin, end in of_file.tolist():
                    for text, is_last in prepare.read_pieces(path, begin, end):
                        yield "val" if is_val[at] else "train", text, is_last
                    at += 1

        total = sum(int((of_file[:, 1] - of_file[:, 0]).sum()) for of_file in spans)
        meta = prepare.write(s.dataset, tokenizer.load(s.tokenizer), pieces(), total, threads=s.threads)
    settings.say(prepare.summary(s.dataset, meta))
    settings.say(f"python train.py --dataset={s.dataset}")


if __name__ == "__main__":
    settings.run(main)
