"""Paths, formats and data sets of the hub -> documents, each a span of bytes of a UTF-8 file.

A file of UTF-8 text is read where it lies. Everything else is first written to a temporary folder as UTF-8: records,
UTF-16, what is compressed, and what can be read only once.
"""

import codecs
import contextlib
import glob
import gzip
import io
import mmap
import os
import re
import shutil
import sys
from array import array
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib import prepare, settings
from lib.settings import UserError

import numpy as np

# Files of records by their names.
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
HUB_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
STDIN, HUB = "-", "hub:"
SHOWN = 5  # names in a message about several files


class Text(NamedTuple):
    """The documents of one file."""

    path: Path  # a UTF-8 file
    name: str  # what a message calls it
    spans: np.ndarray  # the offsets in bytes at which documents begin and end, int64 (n, 2)
    split: str = "train"
    is_records: bool = False


# ---- which files ----


def find(arguments):
    """The sources that paths, folders and globs name, in order: each file once, "-", and "hub:..." as they are.

    Files that are hidden in a folder and empty ones are left out. Raises UserError where nothing is left.
    """
    sources = {}
    for argument in arguments:
        if not argument:
            raise UserError("one of the paths is empty, as an unset variable of the shell is; name files or folders")
        if argument == STDIN or argument.startswith(HUB):
            sources[argument] = argument
            continue
        paths = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise UserError(f"{argument}: there is no such file, folder or glob")
        for path in map(Path, paths):
            for each in files_in(path) if path.is_dir() else [path]:
                sources.setdefault(each.resolve(), each)
    empty = {k: p for k, p in sources.items() if isinstance(p, Path) and p.is_file() and p.stat().st_size == 0}
    if empty:
        settings.say(f"left out {prepare.counted(len(empty), 'empty file')}, the first is {next(iter(empty.values()))}")
    if len(sources) == len(empty):
        raise UserError("these paths hold no text; name files that do")
    return [p for k, p in sources.items() if k not in empty]


def files_in(folder):
    """The files of a folder in order, without hidden ones. Links are followed, and no folder is entered twice.

    Raises OSError for a folder that can't be read.
    """
    regular, astray, entered = [], [], set()

    def refuse(error):
        raise error  # A part of the text must not be left out unsaid.

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        entered.add(os.path.realpath(here))
        folders[:] = [d for d in sorted(folders) if d[0] != "." and os.path.realpath(Path(here, d)) not in entered]
        paths = [Path(here, name) for name in names if name[0] != "."]
        regular += [path for path in paths if path.is_file()]
        astray += [path for path in paths if path.is_symlink() and not path.exists()]
    if astray:
        settings.say(f"left out {prepare.counted(len(astray), 'link')} to nowhere, the first is {astray[0]}")
    return sorted(regular)


# ---- text ----


def read_text(source, separator, folder):
    """The Text of a file, a pipe or standard input. Raises UserError for what is neither UTF-8 nor UTF-16."""
    name = "standard input" if source == STDIN else str(source)
    with open_binary(source) as file:
        is_utf8_file = source != STDIN and source.is_file() and source.suffix.lower() != ".gz"
        if is_utf8_file:
            is_utf8_file = file.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            file.seek(0)
        path = source if is_utf8_file else new_file(folder)
        with contextlib.nullcontext() if is_utf8_file else open(path, "wb") as copy:
            for block in prepare.decode(file, name, takes_utf16=True):
                if "\0" in block:
                    remedy = "iconv -f UTF-16LE -t UTF-8 OLD > NEW converts UTF-16 without a byte-order mark"
                    if "\0" in block[::2]:  # In UTF-16LE only the second byte of a letter is 0.
                        remedy = "name files of plain text"
                    raise UserError(f"{name} holds NUL bytes, as no text does; {remedy}")
                if copy:
                    copy.write(block.encode())
    return Text(path, name, document_spans(path, separator))


def open_binary(source):
    """The bytes of a file, without its compression, or of standard input."""
    if source == STDIN:
        return io.BufferedReader(sys.stdin.buffer)
    return gzip.open(source) if source.suffix.lower() == ".gz" else open(source, "rb")


def new_file(folder, suffix=""):
    """The path of another file in the temporary folder."""
    return folder / f"{len(os.listdir(folder))}{suffix}"


def has(text, separator):
    """Whether a Text that is no records holds the separator."""
    if text.is_records or not text.path.stat().st_size:
        return False
    with mapped(text.path) as content:
        return content.find(separator.encode("utf-8", "surrogateescape")) >= 0


def mapped(path):
    """The bytes of a file as a memory map, so that a large file is not read into memory."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def document_spans(path, separator):
    """The offsets in bytes at which the documents of a file begin and end: int64 (n, 2). Empty ones are left out."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = 3 if file.read(3) == codecs.BOM_UTF8 else 0  # the byte-order mark of an editor
    if not separator or begin == size:
        return np.array([[begin, size]] if begin < size else [], np.int64).reshape(-1, 2)
    spans, mark = array("q"), separator.encode("utf-8", "surrogateescape")
    with mapped(path) as text:
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
                spans.extend((first, last))
            begin = end + len(mark)
    return np.array(spans, np.int64).reshape(-1, 2)


# ---- records, which the library `datasets` reads ----


def record_format(source):
    """The format of a file of records by its name; None for text."""
    return None if source == STDIN else FORMATS.get(Path(source.name.lower().removesuffix(".gz")).suffix)


def read_records(path, column, folder):
    """The Text of a file of one of the FORMATS, one document a record. Raises UserError."""
    datasets = prepare.load_datasets()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    kind = record_format(path)
    read = {"json": datasets.Dataset.from_json, "parquet": datasets.Dataset.from_parquet}.get(
        kind, datasets.Dataset.from_csv
    )
    # These functions ask no hub, as load_dataset would. They take a path for a glob.
    options = {"split": "train", "streaming": True, "cache_dir": str(folder / "cache")}
    if kind in DELIMITERS:  # Words such as NA stay text.
        options |= {"sep": DELIMITERS[kind], "keep_default_na": False}
    if kind == "parquet":  # A batch is as long as the first group of rows otherwise, which may be empty.
        options["batch_size"] = 1000

    def batches():
        parted = {"csv": ", in which commas must part the fields", "tsv": ", in which tabs must part the fields"}
        with prepare.one_line(f"{path} can't be read as records of {kind}", f"mend the file{parted.get(kind, '')}"):
            file = path
            if path.suffix.lower() == ".gz":  # The library can unpack neither parquet nor a name with brackets.
                file = new_file(folder, f".{kind}")
                with gzip.open(path) as packed, open(file, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            file = glob.escape(str(file))
            try:
                # Without a type the numbers of a column would not stay text.
                if kind in DELIMITERS and column in next(iter(read(file, **options)), {}):
                    options["features"] = datasets.Features({column: datasets.Value("string")})
                yield from read(file, **options).iter(1000)
            except Exception:
                if kind != "parquet" and path.is_file():
                    with open_binary(path) as binary:  # If this is not UTF-8, decode names the byte and the remedy.
                        for _ in prepare.decode(binary, path):
                            pass
                raise

    return write_records(batches(), column, str(path), new_file(folder), "train")


def read_hub(source, column, folder):
    """The Texts of a data set of the hub, one for each of its splits. Raises UserError."""
    datasets = prepare.load_datasets()
    repo, _, config = source.removeprefix(HUB).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{source}: write hub:OWNER/NAME, or hub:OWNER/NAME:CONFIG")
    datasets.disable_progress_bars()
    reading = partial(
        prepare.one_line, f"{source} can't be had from the hub", "check OWNER/NAME:CONFIG and the network"
    )
    with reading():  # Without the hf:// a folder of this name on the disk would be taken.
        splits = datasets.load_dataset(
            f"hf://datasets/{repo}", config or None, streaming=True, cache_dir=str(folder / "cache")
        )
    if "train" not in splits:
        raise UserError(f"{source} has no train split (there: {', '.join(splits)}); name another data set")

    def batches(dataset):
        with reading():
            yield from dataset.iter(1000)

    return [
        write_records(batches(dataset), column, f"{source} {hub}", new_file(folder), HUB_SPLITS[hub])
        for hub, dataset in splits.items()
        if hub in HUB_SPLITS
    ]


def write_records(batches, column, name, path, split):
    """Write the column of batches {column: [text or None]} to a file. Returns its Text, without empty documents."""
    from tqdm import tqdm

    ends, empty = array("q", [0]), 0
    with open(path, "wb") as file, tqdm(unit=" records", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        for batch in batches:
            has_text = any(isinstance(value, str) for values in batch.values() for value in values)
            remedy = "--column=NAME takes another" if has_text else "write .jsonl whose records have a field of text"
            if column not in batch:
                raise UserError(f"{name} has no column {column!r} (there: {', '.join(batch)}); {remedy}")
            for document in batch[column]:
                if not isinstance(document, str | None):
                    says = f"{name}: its column {column!r} holds {type(document).__name__} values and not text"
                    raise UserError(f"{says} (there: {', '.join(batch)}); {remedy}")
                if document and not document.isspace():
                    ends.append(ends[-1] + file.write(document.encode()))
                else:
                    empty += 1
            bar.update(len(batch[column]))
    if empty:
        settings.say(f"{name}: left out {prepare.counted(empty, 'record')} without text")
    return Text(path, name, np.stack([ends[:-1], ends[1:]], axis=1), split, is_records=True)


# ---- all of them ----


def read(sources, column, separator, skip, folder):
    """The Texts of sources as find gives them. `folder` takes temporary files.

    skip: leave out files that are not text, and say so. Otherwise they are a UserError that names them together.
    """
    texts, problems = [], []
    for source in sources:
        if isinstance(source, str) and source.startswith(HUB):
            texts += read_hub(source, column, folder)
            continue
        try:
            is_records = record_format(source) is not None
            texts += [read_records(source, column, folder) if is_records else read_text(source, separator, folder)]
        except UserError as error:
            problems.append(str(error))
    if not problems:
        return texts
    # A message is what is wrong, a semicolon, and what to do.
    wrong, remedies = zip(*(problem.rpartition("; ")[::2] for problem in problems), strict=True)
    more = f" and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN)
    says = ", ".join(wrong[:SHOWN]) + more
    if skip:
        settings.say(f"left out {len(wrong)} of {len(sources)} files for not being text: {says}")
        if texts:
            return texts
        raise UserError("none of these files is text; name files that are")
    if len(wrong) > 1:
        says = f"{len(wrong)} of {len(sources)} files are not text: {says}"
    if len(sources) > 1:
        remedies += ("and --skip=True leaves out what is not text",)
    raise UserError(f"{says}; {', '.join(dict.fromkeys(remedies))}")
