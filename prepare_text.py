"""Prepare one's own UTF-8 text: files, folders (every file in them) and globs become data/NAME.

    python prepare_text.py books/*.txt --dataset=books
    python prepare_text.py notes/ 'src/**/*.py' --dataset=mine --tokenizer=bytes
    python prepare_text.py stories.txt --dataset=stories --separator='<|endoftext|>'

Each file is a document, or what stands between two separators. Some documents, drawn by seed, are the validation split;
of a single document its last lines are. Then: python train.py --dataset=NAME
"""

import codecs
import glob
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import config
import data


@dataclass
class Settings:
    path: tuple[str, ...] = ()
    dataset: str = ""  # the name: data/NAME is written
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's byte pairs, or one id for each byte
    separator: str = ""  # text between two documents of a file, such as '<|endoftext|>'; '' is one document a file
    val_fraction: float = 0.01  # share of the bytes that goes to the validation split; 0 is none
    seed: int = 1337  # draws the documents of the validation split
    threads: int = 0  # of the tokenizer; 0 is one a core
    overwrite: bool = False  # replace data/NAME


def find_files(arguments):
    """The non-empty files that paths, folders and globs name, each once, in order."""
    files = {}
    for argument in arguments:
        found = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not found:
            raise config.UserError(f"{argument}: there is no such file, folder or glob")
        for path in map(Path, found):
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not hidden(p, path)]
            for each in inside if path.is_dir() else [path]:
                files.setdefault(each.resolve(), each)
    empty = [p for p in files.values() if p.stat().st_size == 0]
    if empty:
        print(f"left out {len(empty)} empty files, such as {empty[0]}")
    if len(files) == len(empty):
        raise config.UserError("these paths hold no text")
    return [p for p in files.values() if p.stat().st_size]


def hidden(path, folder):
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def mapped(path):
    """A file's bytes, read where they are looked at."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def document_spans(path, separator):
    """Where the documents of a file begin and end, in bytes: int64 (n, 2). Empty ones are left out."""
    size = path.stat().st_size
    if not separator:
        return np.array([[0, size]])
    spans, mark = [], separator.encode("utf-8", "surrogateescape")
    with mapped(path) as text:
        begin = len(codecs.BOM_UTF8) if text[:3] == codecs.BOM_UTF8 else 0  # an editor's mark is no document
        while begin < size:
            found = text.find(mark, begin)
            end = found if found >= 0 else size
            # Line ends around a separator belong to it, not to the documents.
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
    """Cut a single document's span in two at a line's end, so that the second part has about `fraction` of it."""
    begin, end = span
    with mapped(path) as text:
        near = end - int((end - begin) * fraction)
        ends = {text.rfind(b"\n", begin, min(near, end - 1)) + 1, text.find(b"\n", near, end - 1) + 1} - {0}
    if not ends:
        raise config.UserError(f"{path} is one line, which can't be shared out; give more files, or --val_fraction=0")
    cut = min(ends, key=lambda at: abs(at - near))
    return np.array([[begin, cut], [cut, end]])


def draw_validation(sizes, fraction, seed):
    """Which documents, of `sizes` bytes, go to the validation split: bool, one for each; at least one, never all."""
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
    s = config.load(Settings, positional="path")
    config.check(s, not_negative="seed threads", fraction="val_fraction")
    if not s.path:
        raise config.UserError("name the files, folders or globs to prepare; --help shows how")
    if not s.dataset or s.dataset != Path(s.dataset).name or s.dataset.startswith("."):
        raise config.UserError(f"--dataset={s.dataset}: give the data a name, such as --dataset=books")
    with data.lock(s.dataset):
        if s.dataset in data.names() and not s.overwrite:
            raise config.UserError(f"data/{s.dataset} is there already; --overwrite=True replaces it")
        files = find_files(s.path)
        spans = [document_spans(path, s.separator) for path in files]
        if s.separator and all(mapped(path).find(s.separator.encode("utf-8", "surrogateescape")) < 0 for path in files):
            raise config.UserError(f"--separator={s.separator!r} stands in none of these files; check its spelling")
        if sum(map(len, spans)) == 1 and s.val_fraction:
            i = next(i for i, found in enumerate(spans) if len(found))
            spans[i] = last_lines(files[i], spans[i][0], s.val_fraction)
            is_val = np.array([False, True])
        else:
            sizes = np.concatenate([found[:, 1] - found[:, 0] for found in spans])
            if not len(sizes):
                raise config.UserError("these files hold nothing but separators")
            is_val = draw_validation(sizes, s.val_fraction, s.seed) if s.val_fraction else np.zeros(len(sizes), bool)

        def pieces():
            at = 0
            for path, found in zip(files, spans, strict=True):
                for begin, end in found.tolist():
                    for text, is_last in data.read_pieces(path, begin, end):
                        yield "val" if is_val[at] else "train", text, is_last
                    at += 1

        total = sum(int((found[:, 1] - found[:, 0]).sum()) for found in spans)
        meta = data.write(s.dataset, data.tokenizer(s.tokenizer), pieces(), total, threads=s.threads)
    print(data.summary(s.dataset, meta))
    print(f"python train.py --dataset={s.dataset}")


if __name__ == "__main__":
    config.run(main, data.DataError, OSError)
