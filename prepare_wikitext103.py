"""Prepare WikiText-103 (raw), data/wikitext103: from the Hugging Face hub, or from what is already on the disk.

    python prepare_wikitext103.py
    python prepare_wikitext103.py --source=wikitext-103-raw-v1.zip      a zip or folder of wiki.{train,valid,test}.raw
    python prepare_wikitext103.py --source=wikitext/                    a folder of the hub's parquet files

What is read must be WikiText-103 whole: its rows, words and tokens are compared with the published counts.
val_lm_eval.bin and test_lm_eval.bin are the same pages as lm-evaluation-harness's task `wikitext` scores them.
"""

import io
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import config
import data

REPO, NAME = "Salesforce/wikitext", "wikitext-103-raw-v1"
RAW = {"train": "wiki.train.raw", "val": "wiki.valid.raw", "test": "wiki.test.raw"}
HUB = {"train": "train", "val": "validation", "test": "test"}

# Rows and words as published with the corpus; GPT-2 tokens of the joined rows: of train as others publish them.
PUBLISHED = {
    "train": {"lines": 1_801_350, "words": 101_425_671, "tokens": 117_920_140},
    "val": {"lines": 3_760, "words": 213_886, "tokens": 247_289},
    "test": {"lines": 4_358, "words": 241_211, "tokens": 283_287},
    # A page's words as the harness counts them: its two ends are words too. Bytes: of the raw lines.
    "val_lm_eval": {"documents": 60, "words": 213_886 + 2 * 60, "bytes": 1_146_785},
    "test_lm_eval": {"documents": 62, "words": 241_211 + 2 * 62, "bytes": 1_290_527},
}


@dataclass
class Settings:
    source: str = ""  # a folder or zip of wiki.*.raw files, or a folder of the hub's parquet files; '' is the hub
    check: bool = True  # refuse what is not the whole of WikiText-103; False lets a part of it through
    threads: int = 0  # of the tokenizer; 0 is one a core


# ---- rows: what the hub calls one, a line with its end, and "" for a blank line ----


def raw_rows(lines):
    """The rows of a raw file's lines (bytes, split at newlines and nowhere else)."""
    for line in lines:
        yield "" if line.isspace() else line.decode()


def parquet_rows(paths):
    import pyarrow.parquet as pq

    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["text"]):
            yield from batch.column("text").to_pylist()


def hub_rows(dataset):
    for part in dataset.iter(batch_size=4096):
        yield from part["text"]


def open_source(source):
    """{split: (bytes of text, about; a function that iterates over its rows)} of a zip or folder on the disk."""
    path = Path(source)
    if path.is_file() and zipfile.is_zipfile(path):
        members = {Path(m.filename).name: m for m in zipfile.ZipFile(path).infolist()}
        found = {s: members[name] for s, name in RAW.items() if name in members}
        return {s: (m.file_size, lambda m=m: zip_rows(path, m)) for s, m in found.items()}
    if not path.is_dir():
        raise config.UserError(f"--source={source}: this is no folder and no whole zip")
    raw = {s: found[0] for s, name in RAW.items() if (found := sorted(path.rglob(name)))}
    if raw:
        return {s: (p.stat().st_size, lambda p=p: file_rows(p)) for s, p in raw.items()}
    inner = path / NAME if (path / NAME).is_dir() else path  # a copy of the whole repository has other corpora too
    parquet = {s: found for s, hub in HUB.items() if (found := sorted(inner.rglob(f"{hub}-*.parquet")))}
    sizes = {s: 2 * sum(p.stat().st_size for p in found) for s, found in parquet.items()}  # of the text, about
    return {s: (sizes[s], lambda f=found: parquet_rows(f)) for s, found in parquet.items()}


def file_rows(path):
    with open(path, "rb") as f:
        yield from raw_rows(f)


def zip_rows(path, member):
    with zipfile.ZipFile(path) as archive, archive.open(member) as f:
        yield from raw_rows(io.BufferedReader(f))


@contextmanager
def one_line(source):
    """What a library says of a source that cannot be read, as one line."""
    try:
        yield
    except (config.UserError, data.DataError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if source:
            raise config.UserError(f"--source={source} cannot be read ({reason}); fetch it again") from None
        raise config.UserError(
            f"{REPO} could not be had from the hub ({reason}); run this again, or where there is no network: copy "
            "data/wikitext103/ from a machine that has one, or give --source=FOLDER_OR_ZIP with wiki.train.raw, or "
            "try the demo, python train.py config/demo.py"
        ) from None


def open_hub():
    """The same dict from the hub, by its own library, which keeps what it has downloaded and goes on from there."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it retries on its own; what comes of it is ours to say
    found = datasets.load_dataset(REPO, NAME)
    return {s: (found[hub].info.splits[hub].num_bytes, lambda d=found[hub]: hub_rows(d)) for s, hub in HUB.items()}


# ---- pages ----


def is_title(row):
    """Whether a row begins a page, by the rule of lm-evaluation-harness."""
    row = row.replace("= = =", "===").replace("= =", "==").strip()
    return row.startswith("= ") and row.endswith(" =")


def pages(rows):
    """The rows of each page, a list of lists. Blank rows before the first title belong to the first page."""
    page = []
    for row in rows:
        if is_title(row) and any(page):
            yield page
            page = []
        page.append(row)
    if any(page):
        yield page


def page_pieces(split, rows):
    """What data.write takes of a split: its pages, and but for train's the pages that `lm_eval` scores.

    Blank rows are empty, so that a page's text does not show how many lines it has.
    """
    harness = []
    for page in pages(rows):
        yield split, "".join(page), True, {"lines": len(page)}
        if split != "train":
            harness.append(page)
    for i, page in enumerate(harness):
        yield f"{split}_lm_eval", *harness_page(page, is_last=i == len(harness) - 1)


# ---- the task `wikitext`, version 2, of lm-evaluation-harness ----


def harness_page(page, is_last):
    """(text, True, counts) of a page's rows: detokenized, but with the words and bytes of before."""
    page = page[next((i for i, row in enumerate(page) if is_title(row)), 0) :]  # it begins with its title there
    raw = "".join(row or " \n" for row in page)
    raw = raw if is_last else raw.removesuffix("\n")  # lines are joined; after the last one comes an empty one
    counts = {"words": len(re.split(r"\s+", raw)), "lines": None, "bytes": len(raw.encode())}
    return detokenize(raw), True, counts


def detokenize(text):
    """WikiText's spaced-out marks as people write them, step by step as the harness does, oddities included."""
    text = text.replace("s '", "s'")
    text = re.sub("/' [0-9]/", "/'[0-9]/", text)  # a slip there; no page has it
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for before, after in [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")]:
        text = text.replace(before, after)
    for before, after in [(" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]:
        text = text.replace(before, after)
    return text


def compare(splits, check):
    """Raise UserError where the counts are not the published ones; a train split's tokens are only warned of."""
    for split, counts in splits.items():
        for what, published in PUBLISHED[split].items():
            if counts[what] == published:
                continue
            says = f"{split} has {counts[what]:,} {what}, WikiText-103 has {published:,}"
            if check and not (split == "train" and what == "tokens"):
                raise config.UserError(f"{says}; fetch it again, or --check=False takes it as it is")
            print(f"warning: {says}")


def main():
    s = config.load(Settings)
    config.check(s, not_negative="threads")
    with data.lock("wikitext103"):
        if "wikitext103" in data.names():
            have = ", ".join(data.Dataset("wikitext103").paths)
            print(f"data/wikitext103 is there already ({have}); remove the folder to prepare it again")
            return
        with one_line(s.source):
            sources = open_source(s.source) if s.source else open_hub()
        if not sources:
            raise config.UserError(f"--source={s.source} has neither wiki.*.raw nor the hub's *.parquet files")
        if missing := " and ".join(split for split in data.SPLITS if split not in sources):
            if s.check:
                raise config.UserError(f"there is no {missing} split; --check=False prepares the part that is there")
            print(f"left out, since not there: {missing}")

        def pieces():
            with one_line(s.source):
                for split, (_, open_rows) in sources.items():
                    yield from page_pieces(split, open_rows())

        total = sum(size if split == "train" else 2 * size for split, (size, _) in sources.items())
        meta = data.write(
            "wikitext103",
            data.Gpt2Tokenizer(),
            pieces(),
            total,
            threads=s.threads,
            accept=lambda meta: compare(meta["splits"], s.check),
        )
    print(data.summary("wikitext103", meta))


if __name__ == "__main__":
    config.run(main, data.DataError, OSError)
