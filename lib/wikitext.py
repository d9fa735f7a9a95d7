"""WikiText-103 and WikiText-2 -> data/NAME: rows of the hub or of files, pages, and the form that `lm_eval` scores.

Both corpora are configurations of one repository of the hub. Their validation and test text is the same.
"""

import io
import re
import zipfile
from functools import partial
from pathlib import Path

from lib import data, prepare, settings, tokenizer
from lib.settings import UserError

REPO = "Salesforce/wikitext"
RAW = {"train": "wiki.train.raw", "val": "wiki.valid.raw", "test": "wiki.test.raw"}
HUB = {"train": "train", "val": "validation", "test": "test"}

# Rows and words are those published with the corpora. Tokens are GPT-2's of the joined rows.
VAL_AND_TEST = {
    "val": {"lines": 3_760, "words": 213_886, "tokens": 247_289},
    "test": {"lines": 4_358, "words": 241_211, "bytes": 1_287_656, "tokens": 283_287},
    # The harness counts the two ends of a page as words too. The bytes are those of the raw lines.
    "val_lm_eval": {"documents": 60, "words": 213_886 + 2 * 60, "bytes": 1_146_785},
    "test_lm_eval": {"documents": 62, "words": 241_211 + 2 * 62, "bytes": 1_290_527},
}


# ---- rows, as the hub has them: a line with its line end, and "" for a blank line ----


def raw_rows(lines):
    """Yield the row of each line of a raw file. A line is bytes, and ends at a newline only."""
    for line in lines:
        yield "" if line.isspace() else line.decode()


def parquet_rows(paths):
    """Yield the rows of the hub's parquet files."""
    import pyarrow.parquet as pq

    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["text"]):
            yield from batch.column("text").to_pylist()


def hub_rows(dataset):
    """Yield the rows of a split that the hub's library has opened."""
    for part in dataset.iter(batch_size=4096):
        yield from part["text"]


def open_source(source, config):
    """Find the splits in a zip or folder: {split: (approximate bytes of text, function that yields its rows)}.

    config: the folder to take of a copy of the hub's whole repository.
    """
    path = Path(source)
    if path.is_file() and zipfile.is_zipfile(path):
        members = {Path(m.filename).name: m for m in zipfile.ZipFile(path).infolist()}
        splits = {s: members[name] for s, name in RAW.items() if name in members}
        return {s: (member.file_size, partial(zip_rows, path, member)) for s, member in splits.items()}
    if not path.is_dir():
        raise UserError(f"--source={source} is neither a folder nor a whole zip; name one that is")
    raw = {s: paths[0] for s, name in RAW.items() if (paths := sorted(path.rglob(name)))}
    if raw:
        return {s: (p.stat().st_size, partial(file_rows, p)) for s, p in raw.items()}
    # A copy of the hub's whole repository has other corpora too.
    inner = path / config if (path / config).is_dir() else path
    parquet = {s: paths for s, hub in HUB.items() if (paths := sorted(inner.rglob(f"{hub}-*.parquet")))}
    # The text takes about twice the bytes of its parquet files.
    sizes = {s: 2 * sum(p.stat().st_size for p in paths) for s, paths in parquet.items()}
    return {s: (sizes[s], partial(parquet_rows, paths)) for s, paths in parquet.items()}


def file_rows(path):
    """Yield the rows of a raw file."""
    with open(path, "rb") as f:
        yield from raw_rows(f)


def zip_rows(path, member):
    """Yield the rows of a raw file in a zip."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as f:
        yield from raw_rows(io.BufferedReader(f))


def open_hub(config):
    """Find the splits on the hub, as open_source does. A download that broke off goes on where it stopped."""
    splits = prepare.load_datasets().load_dataset(REPO, config)
    sizes = {s: splits[hub].info.splits[hub].num_bytes for s, hub in HUB.items()}
    return {s: (sizes[s], partial(hub_rows, splits[hub])) for s, hub in HUB.items()}


# ---- pages ----


def is_title(row):
    """Whether a row is the title of a page by the rule of lm-evaluation-harness."""
    row = row.replace("= = =", "===").replace("= =", "==").strip()
    return row.startswith("= ") and row.endswith(" =")


def pages(rows):
    """Yield each page as a list of its rows. Blank rows before the first title belong to the first page."""
    page = []
    for row in rows:
        if is_title(row) and any(page):
            yield page
            page = []
        page.append(row)
    if any(page):
        yield page


def page_pieces(split, rows):
    """Yield the pages of a split as prepare.write takes them, and after them the pages that `lm_eval` scores.

    The train split has none of the latter. A blank row adds no text, so the lines of a page are counted here.
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
    """(text, True, counts) of a page: its detokenized text, with the words and bytes that it had before."""
    page = page[next((i for i, row in enumerate(page) if is_title(row)), 0) :]  # without blank rows before the title
    raw = "".join(row or " \n" for row in page)
    # The harness joins lines by newlines, so a page does not end in one. Only after the last page comes an empty line.
    raw = raw if is_last else raw.removesuffix("\n")
    counts = {"words": len(re.split(r"\s+", raw)), "lines": None, "bytes": len(raw.encode())}
    return detokenize(raw), True, counts


def detokenize(text):
    """Undo the spaces that WikiText puts around marks. The steps and their oddities are the harness's."""
    text = text.replace("s '", "s'")
    text = re.sub("/' [0-9]/", "/'[0-9]/", text)  # a slip of the harness, which no page meets
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


# ---- data/NAME ----


def compare(splits, published, title, check):
    """Raise UserError where a count is not the published one. The tokens of the train split only give a warning."""
    for split, counts in splits.items():
        for what, number in published[split].items():
            if counts[what] == number:
                continue
            says = f"{split} has {counts[what]:,} {what}, {title} has {number:,}"
            if check and not (split == "train" and what == "tokens"):
                raise UserError(f"{says}; fetch it again, or --check=False accepts it as it is")
            settings.say(f"warning: {says}")


def write(name, title, config, published, s):
    """Prepare a corpus as data/NAME by the settings of its script: source, check, threads.

    config: its configuration on the hub. published: its counts, {split: {count: number}}. Raises UserError.
    """
    settings.check(s, not_negative="threads")
    says, remedy = f"--source={s.source} can't be read", "fetch it again"
    if not s.source:
        says = f"{REPO} could not be fetched from the hub"
        remedy = f"run this again. Without a network, copy data/{name}/ from a machine that has one, or name a folder "
        remedy += "or zip with wiki.train.raw by --source=PATH, or try the demo: python train.py config/demo.py"
    if s.source and not Path(s.source).exists():
        raise UserError(f"--source={s.source}: there is no such folder or zip; name one that exists")
    with prepare.lock(name):
        if name in data.names():
            have = ", ".join(data.Dataset(name).paths)
            settings.say(f"data/{name} exists already ({have}); remove the folder to prepare it again")
            return
        with prepare.one_line(says, remedy):
            sources = open_source(s.source, config) if s.source else open_hub(config)
        if not sources:
            raise UserError(f"--source={s.source} has neither wiki.*.raw nor the hub's *.parquet; name another source")
        if missing := " and ".join(split for split in data.SPLITS if split not in sources):
            if s.check:
                raise UserError(f"there is no {missing} split; --check=False prepares the part that exists")
            settings.say(f"left out, because there is no such split: {missing}")

        def pieces():
            with prepare.one_line(says, remedy):
                for split, (_, open_rows) in sources.items():
                    yield from page_pieces(split, open_rows())

        total = sum(size if split == "train" else 2 * size for split, (size, _) in sources.items())
        meta = prepare.write(
            name,
            tokenizer.Gpt2Tokenizer(),
            pieces(),
            total,
            threads=s.threads,
            accept=lambda meta: compare(meta["splits"], published, title, s.check),
        )
    settings.say(prepare.summary(name, meta))
