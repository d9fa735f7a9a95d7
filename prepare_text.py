"""Prepare your own text: the files that paths, folders and globs name become data/NAME.

    python prepare_text.py books/*.txt --dataset=books
    python prepare_text.py notes/ 'src/**/*.py' --dataset=mine --tokenizer=bytes
    python prepare_text.py stories.txt --dataset=stories --separator='<|endoftext|>'
    python prepare_text.py reviews.jsonl more.csv.gz --dataset=reviews --column=review
    python prepare_text.py hub:OWNER/NAME:CONFIG --dataset=theirs
    zcat dump.gz | python prepare_text.py - --dataset=dump

A folder stands for every file in it that is not hidden. Each file is a document. With --separator, a document is the
text between two separators. Text is UTF-8, or UTF-16 with a byte-order mark. Each record of a .jsonl, .ndjson, .json,
.csv, .tsv or .parquet file is a document. All of these may be .gz files. `-` is standard input. `hub:` is a data set of
the Hugging Face hub. What is not plain UTF-8 is kept in a temporary folder in data/ until the end.

Some documents are drawn for the validation split. Where whole documents would miss its share by more than half, it is
the end of the largest one. A data set of the hub may bring splits of its own. The last line printed is a command that
trains on the result.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib import data, prepare, settings, text, tokenizer
from lib.settings import UserError

import numpy as np

# The config for a text of fewer bytes than this.
CONFIGS = {1e6: "config/text_small.py", 20e6: "config/text_medium.py", float("inf"): "config/books.py"}
NO_EVALUATION = ["--eval_interval=0", "--patience=0", "--sample_tokens=0"]


@dataclass
class Settings:
    path: tuple[str, ...] = ()  # files, folders, globs, - and hub:OWNER/NAME[:CONFIG]
    dataset: str = ""  # name of the folder under data/ to write; it must be given
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2 (byte pairs), bytes (one id for each byte)
    separator: str = ""  # text between two documents of a file, such as '<|endoftext|>'; '' is one document a file
    column: str = "text"  # the field of a record that is its text
    skip: bool = False  # True leaves out files that are not text, and counts them
    val_fraction: float = 0.01  # share of the bytes that goes to the validation split; 0 is no such split
    seed: int = 1337  # seed of the draw of the documents for the validation split
    threads: int = 0  # threads that encode; 0 is one for each core
    overwrite: bool = False  # True replaces an existing data/NAME


# ---- the validation split ----


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


def place_to_cut(path, begin, end, share, is_alone):
    """Where to cut a document so that the last part has about `share` bytes: a line end, else white space.

    Either must lie within half the share. A document that is alone is cut at the nearest line end, however far. Returns
    0 where there is no such place.
    """
    near = end - int(share)
    with text.mapped(path) as content:
        line_ends = {content.rfind(b"\n", begin, min(near, end - 1)) + 1, content.find(b"\n", near, end - 1) + 1} - {0}
        first = max(begin + 1, near - prepare.PIECE)
        window = content[first - 1 : min(end, near + prepare.PIECE)]
    spaces = (first - 1 + space.start() for space in re.finditer(rb"(?<=\S)\s", window))
    nearest = [min(places, key=lambda at: abs(at - near), default=0) for places in (line_ends, spaces)]
    close = [at for at in nearest if at and abs(at - near) <= share / 2]
    if close:
        return close[0]
    return nearest[0] if is_alone else 0


def share_out(texts, fraction, seed):
    """The documents of all Texts: int64 (n, 4). Some become the validation split, unless a Text brings one.

    A row is (index of the Text, begin, end, index of the split in data.SPLITS). Returns the rows, and the index of the
    row that is cut off the document of the row before it; None where no document is cut.
    """
    table = np.concatenate(
        [np.insert(t.spans, [0, 2], [i, data.SPLITS.index(t.split)], axis=1) for i, t in enumerate(texts)]
    )
    sizes, splits = table[:, 2] - table[:, 1], table[:, 3]
    train, val = data.SPLITS.index("train"), data.SPLITS.index("val")
    drawn_from = np.flatnonzero(splits == train)
    if not fraction or (splits == val).any() or not len(drawn_from):
        return table, None
    is_alone, share = len(drawn_from) == 1, fraction * sizes[drawn_from].sum()
    chosen = drawn_from[draw_validation(sizes[drawn_from], fraction, seed)]
    if is_alone or abs(sizes[chosen].sum() - share) > share / 2:
        largest = drawn_from[sizes[drawn_from].argmax()]
        of_text, begin, end, _ = table[largest].tolist()
        path, name, *_ = texts[of_text]
        at = place_to_cut(path, begin, end, share, is_alone) if share < end - begin else 0
        if at:
            size = prepare.counted(end - at, "byte")
            settings.say(f"the validation split is the last {size} of a document of {name}")
            table[largest, 2] = at
            return np.insert(table, largest + 1, [of_text, at, end, val], axis=0), largest + 1
        if is_alone:
            raise UserError(f"{name} is one line, which can't be split; name more files, or take --val_fraction=0")
    table[chosen, 3] = val
    return table, None


# ---- what is printed ----


def warn_of_copies(table, digests):
    """Say how many documents of a held-out split are in the train split too. digests: uint64 (n,)."""
    train = digests[table[:, 3] == 0]
    for i, split in enumerate(data.SPLITS[1:], start=1):
        held_out = digests[table[:, 3] == i]
        if copies := np.isin(held_out, train).sum():
            of = prepare.counted(len(held_out), "document")
            settings.say(
                f"warning: the train split holds {copies:,} of {of} of the {split} split too, "
                "which makes the loss too low; leave out the copies"
            )


def next_command(dataset, meta):
    """The command that trains on the data by the config that fits their size."""
    size = sum(counts["bytes"] for counts in meta["splits"].values())
    config = next(config for limit, config in CONFIGS.items() if size < limit)
    if size < min(CONFIGS) and meta["tokenizer"] == "gpt2":
        settings.say("a text of less than 1 MB suits a small model better as bytes: --tokenizer=bytes --overwrite=True")
    words = ["python", "train.py", config, f"--dataset={dataset}", f"--out_dir=out/{dataset}"]
    has_validation = "val" in meta["splits"] and meta["splits"]["val"]["tokens"] > 1
    return shlex.join(words + NO_EVALUATION * (not has_validation))


def main():
    s = settings.load(Settings, positional="path")
    settings.check(s, not_negative="seed threads", fraction="val_fraction")
    if not s.path:
        raise UserError("name the files, folders or globs to prepare; --help shows examples")
    if not s.dataset or s.dataset != Path(s.dataset).name or s.dataset.startswith("."):
        raise UserError(f"--dataset={s.dataset}: give the data a name, such as --dataset=books")
    with prepare.lock(s.dataset), prepare.temporary_folder(s.dataset, "text") as folder:
        # A Mac's file system finds data/books by the name Books too, and a list of names would not.
        if any(Path("data", s.dataset).glob("*.bin")) and not s.overwrite:
            raise UserError(f"data/{s.dataset} exists already; --overwrite=True replaces it")
        texts = text.read(text.find(s.path), s.column, s.separator, s.skip, folder)
        if s.separator and all(each.is_records for each in texts):
            raise UserError("--separator does not part records, since each of them is a document; leave it out")
        if s.separator and not any(text.has(each, s.separator) for each in texts):
            raise UserError(f"--separator={s.separator!r} is in none of these files; check its spelling")
        if not sum(len(each.spans) for each in texts):
            only = "nothing but separators" if s.separator else "no text"
            raise UserError(f"what is named holds {only}; name files with text")
        table, cut = share_out(texts, s.val_fraction, s.seed)
        digests = np.zeros(len(table), np.uint64)

        def pieces():
            has_mark = bool(s.separator)
            for i, (of_text, begin, end, split) in enumerate(table.tolist()):
                source = texts[of_text]
                if i != cut:  # The digest of the last part of a document goes on to be that of the whole document.
                    digest = hashlib.blake2b(digest_size=8)
                for piece, is_last in prepare.read_pieces(source.path, begin, end):
                    digest.update(piece.encode())
                    if not has_mark and not source.is_records and tokenizer.ENDOFTEXT in piece:
                        has_mark = True
                        settings.say(
                            f"warning: {source.name} holds {tokenizer.ENDOFTEXT}, which is read as plain text; "
                            f"--separator='{tokenizer.ENDOFTEXT}' makes it part documents"
                        )
                    yield data.SPLITS[split], piece, is_last
                digests[i] = int.from_bytes(digest.digest())

        total = int((table[:, 2] - table[:, 1]).sum())
        meta = prepare.write(s.dataset, tokenizer.load(s.tokenizer), pieces(), total, threads=s.threads)
    warn_of_copies(table, digests)
    settings.say(prepare.summary(s.dataset, meta))
    settings.say(next_command(s.dataset, meta))


if __name__ == "__main__":
    settings.run(main)
