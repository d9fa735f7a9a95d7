"""Text -> data/NAME: read in pieces, encoded by threads, counted, and written whole or not at all."""

import codecs
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import data, files, settings
from lib.settings import UserError

import numpy as np
from filelock import Timeout

PIECE = 1 << 20  # bytes of a read, and about as many characters for a thread at a time
UP_TO_BLANK = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)  # all before the last blank that follows something else
# How files begin that a program has packed: (what it is, what unpacks it).
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
}
NEAR = 4096  # bytes on either side of one that is not text, which tell what the file is


# ---- reading text ----


def decode(file, name, begin=0, end=math.inf, takes_utf16=False):
    """Yield the text of an open binary file in blocks. `name` is what an error calls the file.

    begin: the offset at which the file stands. end: the offset after the last byte; inf is the end of the file.
    takes_utf16: read as UTF-16 what begins with its byte-order mark, and as UTF-8 the rest. Raises UserError for a byte
    that is not of the encoding, with its offset, and for a file that can't be read.
    """
    at, decoder = begin, None
    while at < end:
        try:
            block = file.read(min(PIECE, end - at))
        except (OSError, EOFError, zlib.error) as error:  # A broken disk is reported without the name of the file.
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{name} can't be read ({reason}); put a sound copy in its place") from None
        if not block and end < math.inf:
            raise UserError(f"{name} became shorter while it was read; prepare again")
        if decoder is None:
            is_utf16 = takes_utf16 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "UTF-16" if is_utf16 else "UTF-8"
            decoder = codecs.getincrementaldecoder(encoding)()
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block has begun
        try:
            text = decoder.decode(block, final=not block or at + len(block) == end)
        except UnicodeDecodeError as error:
            offset = at - pending + error.start
            near = error.object[max(0, error.start - NEAR) : error.start + NEAR]
            raise UserError(f"{name}: byte {offset:,} is not {encoding}{advice(near, encoding)}") from None
        yield text.removeprefix("\ufeff") if at == 0 else text  # without the byte-order mark of a Windows editor
        if not block:
            return
        at += len(block)


def advice(near, encoding):
    """What a message says of the bytes near one that is not of the encoding: what they are, and what to do."""
    if encoding == "UTF-16":
        return "; put a sound copy in its place"
    for magic, (what, unpacks) in PACKED.items():
        if near.startswith(magic):
            return f" (it is {what}); {unpacks} it first"
    if near.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " (it is UTF-16); iconv -f UTF-16 -t UTF-8 OLD > NEW converts UTF-16"
    if near.startswith(b"\xff\xff\xff\xff"):  # as save_to_disk writes it
        return " (it is Arrow); datasets.load_from_disk(FOLDER).to_parquet(NEW) converts it"
    if re.search(rb"[^\t\n\f\r -~\x80-\xff]", near):  # Latin-1 text holds no other control bytes.
        return " (it looks binary); name files of plain text"
    return "; iconv -f LATIN1 -t UTF-8 OLD > NEW converts Latin-1"


def read_pieces(path, begin=0, end=None):
    """Yield the text in bytes begin..end of a file as pieces (text, is_last) that encode as the whole would.

    A piece ends where a blank follows something else. GPT-2's pre-tokenizer breaks there, whatever comes later.
    Raises UserError as decode does.
    """
    text = ""
    with open(path, "rb") as f:
        f.seek(begin)
        for block in decode(f, path, begin, os.path.getsize(path) if end is None else end):
            # The text before is cut only now, since the last piece takes what is left. What lies before its newest
            # block was searched when that was read.
            if found := UP_TO_BLANK.match(text, max(0, len(text) - PIECE - 1)):
                yield text[: found.end()], False
                text = text[found.end() :]
            text += block
    yield text, True


# ---- encoding ----


def encode_pieces(tok, dtype, pieces):
    """Encode the pieces that a thread gets at a time. Returns {split: (ids (n,), [counts of each piece])}.

    A piece is (split, text, is_first, is_last, known): whether it begins and ends a document, and the counts that are
    not taken from its text.
    """
    splits = {}
    for split, text, is_first, is_last, known in pieces:
        ids, piece_counts = splits.setdefault(split, ([], []))
        encoded = tok.encode(text).astype(dtype)
        ids += [np.array([tok.eot], dtype), encoded] if is_first else [encoded]
        counts = {
            "tokens": len(encoded),
            "documents": int(is_first),
            "words": len(text.split()),
            "lines": text.count("\n") + (is_last and text[-1:] not in ("", "\n")),
            "bytes": len(text) if text.isascii() else len(text.encode()),
        }
        piece_counts.append(counts | known)
    return {split: (np.concatenate(ids), piece_counts) for split, (ids, piece_counts) in splits.items()}


def add_counts(total, counts):
    """Add counts to `total` in place. A count that is unknown (None) for a part is unknown for the whole."""
    for k, v in counts.items():
        total[k] = None if v is None or total.get(k, 0) is None else total.get(k, 0) + v


class SplitFile:
    """A token file while it is written, with the checksum and the counts of its ids so far."""

    def __init__(self, file, lists_documents):
        self.file, self.lists_documents = file, lists_documents
        self.hash, self.totals, self.documents = hashlib.sha256(), {}, []

    def add(self, ids, piece_counts):
        """Append ids. `piece_counts` holds the counts of each piece that they encode."""
        self.file.write(ids.data)
        self.hash.update(ids.data)
        for counts in piece_counts:
            add_counts(self.totals, counts)
            if self.lists_documents:
                self.documents += [{}] if counts["documents"] else []
                add_counts(self.documents[-1], counts)

    def finish(self):
        """Bring the file to the disk. Returns the entry of the split in meta.json."""
        files.sync(self.file)
        entry = {k: self.totals[k] for k in data.COUNTS} | {"sha256": self.hash.hexdigest()}
        if self.documents:
            known = [k for k in ("words", "lines", "bytes") if self.totals[k] is not None]
            entry["per_document"] = {k: [d[k] for d in self.documents] for k in known}
        return entry


def encode_into(folder, name, tok, dtype, pieces, total_bytes, threads):
    """Encode `pieces` into the token files of a folder. Returns {split: entry in meta.json}.

    Reading, encoding and writing overlap. The number of pieces in memory is bounded.
    """
    from tqdm import tqdm

    written, queue, began = {}, deque(), time.perf_counter()
    # With disable=None a log file gets no bar. The line at the end has the same figure.
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=name, disable=None)
    with contextlib.ExitStack() as stack, bar, ThreadPoolExecutor(threads) as pool:

        def rate():
            done = sum(f.totals["tokens"] for f in written.values())
            return f"{done / (time.perf_counter() - began):,.0f} tokens/s"

        def write_oldest():
            for split, (ids, piece_counts) in queue.popleft().result().items():
                if split not in written:
                    if split not in data.TOKEN_FILES:
                        raise UserError(f"a piece is for the split {split!r}; the splits are {', '.join(data.SPLITS)}")
                    file = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                    # The train split may have millions of documents, and nothing needs the counts of each.
                    written[split] = SplitFile(file, lists_documents=split != "train")
                written[split].add(ids, piece_counts)
                bar.update(sum(counts["bytes"] or 0 for counts in piece_counts))
            bar.set_postfix_str(rate(), refresh=False)

        group, size, is_first = [], 0, True
        for split, text, is_last, *known in pieces:
            group.append((split, text, is_first, is_last, *(known or [{}])))
            size, is_first = size + len(text), is_last
            if size >= PIECE:
                queue.append(pool.submit(encode_pieces, tok, dtype, group))
                group, size = [], 0
            if len(queue) > 3 * threads:
                write_oldest()
        queue.append(pool.submit(encode_pieces, tok, dtype, group))
        while queue:
            write_oldest()
        entries = {split: written[split].finish() for split in data.TOKEN_FILES if split in written}
    settings.say(f"encoded in {time.perf_counter() - began:.1f} s, {rate()}")
    return entries


# ---- writing data/NAME ----


def write(name, tok, pieces, total_bytes, accept=None, threads=0):
    """Encode `pieces`, an iterable of (split, text, is_last), into data/NAME. Returns the content of its meta.json.

    total_bytes: about the bytes of all pieces, for the progress bar. threads: 0 is one for each core.
    A piece may have a fourth member such as {"lines": 3}. It replaces the counts of the text; None is an unknown
    count. The folder appears, or its files are replaced, only after all files are on the disk and accept(meta) has
    returned. `accept` rejects the data by an exception. Raises UserError where there is no text, or no room for it.
    """
    dtype = np.dtype("<u2") if tok.vocab_size <= 1 << 16 else np.dtype("<u4")
    with temporary_folder(name, "partial") as partial:
        splits = encode_into(partial, name, tok, dtype, pieces, total_bytes, threads or os.cpu_count())
        if not splits:
            raise UserError(f"there is no text to make data/{name} of; name a source that holds some")
        meta = {"tokenizer": tok.spec, "vocab_size": tok.vocab_size, "dtype": dtype.name, "splits": splits}
        if accept:
            accept(meta)
        # One line for each list: there may be thousands of documents.
        text = re.sub(r"\[[\s\d,]+\]", lambda m: " ".join(m[0].split()), json.dumps(meta, indent=2))
        with open(partial / "meta.json", "w", encoding="utf-8") as f:
            f.write(text)
            files.sync(f)
        put_in_place(partial, Path(os.path.realpath(Path("data", name))), splits)
        return meta


@contextlib.contextmanager
def temporary_folder(name, suffix):
    """A new folder on the disk of data/NAME, which is removed in the end. A full disk is a UserError."""
    folder = Path(os.path.realpath(Path("data", name)))  # data/NAME may be a link to a larger disk.
    if Path("data", name).is_symlink() and not folder.parent.exists():
        raise UserError(f"data/{name} is a link to {folder}, whose disk is not there; mount it, or remove the link")
    # A rename works within one disk only. A folder that exists may be the root of a disk; its parent is on another.
    path = folder / f".{suffix}" if folder.exists() else folder.with_name(f".{folder.name}.{suffix}")
    shutil.rmtree(path, ignore_errors=True)  # the rest of a preparation that was killed
    path.mkdir(parents=True)
    try:
        yield path
    except OSError as error:
        if error.filename:
            raise
        # A full disk is reported without the name of a file. Whatever reads a source names it in an error of its own.
        reason = error.strerror or error
        raise UserError(f"data/{name} can't be written ({reason}); {files.remedy(error, 'for it')}") from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def one_line(says, remedy):
    """Turn the error of a library that reads a source into a UserError: `says`, the library's reason, the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason, behind = f"{type(error).__name__}: {settings.brief(error)}", error
        while behind := behind.__cause__ or behind.__context__:
            if getattr(behind, "response", None) is not None:
                reason += f", and the server has answered {behind.response.status_code}"
                break
        raise UserError(f"{says} ({reason}); {remedy}") from None


def load_datasets():
    """The library `datasets`, which takes seconds to import. Raises UserError where the environment stops it."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # It prints what stops it.
    with one_line("the library datasets can't be loaded", "unset the variables HF_*"), quiet:
        import datasets
        from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # The library retries by itself, and one_line() reports what fails in the end.
    return datasets


def put_in_place(partial, folder, splits):
    """Rename the finished folder, or move its files into the folder that exists."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    # meta.json goes first. Sizes and checksums disagree with it until the last token file has followed. A replacement
    # that is cut short in between is therefore refused, and is not taken for either dataset.
    for file in ["meta.json", *(f"{split}.bin" for split in splits)]:
        os.replace(partial / file, folder / file)
    for split in set(data.TOKEN_FILES) - set(splits):
        (folder / f"{split}.bin").unlink(missing_ok=True)


def counted(number, noun):
    """A number and its noun, as in "1 file" and "2 files"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def summary(name, meta):
    """The counts of a dataset, a line for each split."""
    lines = [f"data/{name}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids"]
    for split, c in meta["splits"].items():
        facts = [counted(c[k], k.removesuffix("s")) for k in data.COUNTS if c[k] is not None]
        lines.append(f"  {split:12s} {', '.join(facts)}")
    return "\n".join(lines)


@contextlib.contextmanager
def lock(name):
    """A lock between the processes of a machine: one of them prepares data/NAME, and the others wait."""
    path = Path("data", f".{name}.lock")
    path.parent.mkdir(exist_ok=True)
    try:
        lock_file = files.lock(path, timeout=0)
    except Timeout:
        settings.say(f"another process prepares data/{name} and holds {path}; this one waits for it")
        lock_file = files.lock(path)
    try:
        yield
    finally:
        lock_file.release()


def ensure(name):
    """Run prepare_NAME.py where data/NAME is missing. Only one process of a machine runs it.

    A name without such a script is left to data.Dataset, which lists the datasets that exist. Raises UserError where
    the script fails.
    """
    script = Path(__file__).parent.parent / f"prepare_{name}.py"
    # prepare_text.py does not prepare a dataset "text". It has to be told which files to read.
    if name in data.names() or name == "text" or not script.exists():
        return
    with lock(f"{name}.train"):
        if name not in data.names():
            settings.say(f"data/{name} is missing: running {script.name}")
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise UserError(f"{script.name} did not finish, so there is no data/{name}; it says why above")
