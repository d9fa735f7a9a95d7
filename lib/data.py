"""data/NAME -> the batch of a step and the windows of an evaluation.

data/NAME/{train,val,test}.bin hold token ids, little-endian uint16 (uint32 above 65,536 ids) and nothing else.
meta.json beside them says which tokenizer made them and what each split holds. A document is preceded by one
end-of-text, which no count of meta.json and no evaluation includes. lib/prepare.py writes such folders.
"""

import codecs
import contextlib
import hashlib
import json
import re
import shlex
from pathlib import Path

from lib import files, tokenizer
from lib.settings import UserError

import numpy as np

SPLITS = ("train", "val", "test")
TOKEN_FILES = (*SPLITS, "val_lm_eval", "test_lm_eval")  # The last two hold the pages of the protocol `lm_eval`.
COUNTS = ("tokens", "documents", "words", "lines", "bytes")  # what meta.json says of a split


# How files of another kind begin. Three bytes can be ids, and count only where another id is beyond the vocabulary.
MAGIC = {
    b"\x93NUMPY": "is a .npy file",
    b"PK\x03\x04": "is a zip or .npz archive",
    b"PAR1": "is a Parquet file",
    b"\x1f\x8b\x08": "is compressed by gzip",
    b"\xff\xfe": "is text",  # UTF-16
    b"\x88\xd8\x34\x01": "begins with llm.c's header, which tail -c +1025 OLD > NEW leaves out",
}
NUMBERS = {
    "i4": "has ids of four bytes or more",
    "f2": "has float16 numbers",
    "f4": "has float32 numbers",
    "f8": "has float64 numbers",
}
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # rare in a text


# ---- reading a dataset ----


def names():
    """The datasets there are."""
    return sorted({p.parent.name for p in Path("data").glob("[!.]*/*.bin")})


class Dataset:
    """data/NAME, opened: .tokenizer_spec .vocab_size .eot .dtype .splits {split: counts, None where not known}.

    .checksums {split: sha256} are those of the verified splits. A folder without meta.json is nanoGPT's: uint16 and
    GPT-2 ids, or the characters of its meta.pkl. Raises UserError where there is no such folder, or where its
    meta.json does not describe one.
    """

    def __init__(self, name):
        self.name, self.folder, self.checksums = name, Path("data", name), {}
        self.stamps = {}  # {split: the stamp of its token file when it was mapped}
        self.validation = None  # what validation_ids() gives, once it has been read
        self.paths = {s: p for s in TOKEN_FILES if files.is_file(p := self.folder / f"{s}.bin")}
        self.has_meta = files.is_file(self.folder / "meta.json")
        if not self.paths and not self.has_meta:
            if (script := self.folder / "prepare.py").is_file():  # nanoGPT's
                raise UserError(f"{self.folder} has no train.bin yet; `python {shlex.quote(str(script))}` writes it")
            known = ", ".join(names()) or "none yet"
            can_be_made = name.isprintable() and name == Path(name).name and name[:1] not in ("", ".")
            raise UserError(
                f"there is no dataset {str(self.folder)!r} (there: {known}); `python prepare_text.py FILES --dataset="
                f"{shlex.quote(name) if can_be_made else 'NAME'}` makes one of your own text, "
                "`python prepare_stdlib.py` the demo's"
            )
        if self.has_meta:
            meta = read_meta(self.folder / "meta.json")
            self.tokenizer_spec, self.vocab_size = meta["tokenizer"], meta["vocab_size"]
            self.dtype, self.splits = np.dtype(meta["dtype"]).newbyteorder("<"), meta["splits"]
        else:
            self.tokenizer_spec = tokenizer.nanogpt_spec(name)
            self.vocab_size = tokenizer.vocab_size_of(self.tokenizer_spec)
            self.dtype = np.dtype("<u2")
            self.splits = {split: dict.fromkeys((*COUNTS, "sha256")) for split in self.paths}
        self.eot = tokenizer.eot_of(self.tokenizer_spec)

    def check_tokenizer(self, opened):
        """Raise UserError unless the tokenizer of an Opened model is the one that made these tokens."""
        if (spec := tokenizer.spec_of_model(opened)) != self.tokenizer_spec:
            raise UserError(
                f"{opened.name} has the tokenizer {spec[:40]!r}, {self.folder} was made with "
                f"{self.tokenizer_spec[:40]!r}; take or prepare data with the model's"
            )

    def tokens(self, split):
        """The ids of a split as they lie in the file, end-of-texts included: a read-only memory map (n,).

        Raises UserError where there is no such file, or where its size is not that of meta.json.
        """
        if split not in self.splits or split not in self.paths:
            have = ", ".join(s for s in self.paths if s in self.splits)
            raise UserError(f"{self.folder} has no {split} split (there: {have or 'none'}); prepare data that has one")
        path, counts = self.paths[split], self.splits[split]
        size, width = path.stat().st_size, self.dtype.itemsize
        if size == 0 or size % width:
            raise UserError(f"{path} is {size:,} bytes long, not a whole number of {width}-byte ids; prepare it again")
        if None not in (counts["tokens"], counts["documents"]):
            expected = counts["tokens"] + counts["documents"]
            if size != width * expected:
                raise UserError(f"{path} holds {size // width:,} ids, meta.json says {expected:,}; prepare it again")
        self.stamps[split] = files.stamp(path)
        return np.memmap(path, self.dtype, mode="r")

    def check_unchanged(self, split):
        """Raise UserError where a verified token file has been overwritten in place. Its memory map shows that at once.

        A file that has taken its name is another one, and the old one stays mapped.
        """
        before, now = self.stamps[split], files.stamp(self.paths[split])
        if now in (before, None) or now[0] != before[0]:
            return
        if now[1] == before[1]:  # Only its time is another one, as after a touch. The bytes tell.
            digest = hashlib.sha256(self.tokens(split).data).hexdigest()
            if digest == self.checksums[split]:
                return
        raise UserError(f"{self.paths[split]} was overwritten while the run read it; put it back and go on")

    def size(self, split):
        """The tokens of a split: without its end-of-texts, where meta.json knows them."""
        return self.splits[split]["tokens"] or len(self.tokens(split))

    def verify(self, split):
        """Read a split once, and return its sha256.

        Raises UserError unless its ids lie in the vocabulary and its checksum is meta.json's. Without a meta.json there
        is no checksum, and a file that does not hold uint16 ids is recognised by its content.
        """
        tokens, digest, path = self.tokens(split), hashlib.sha256(), self.paths[split]
        if not self.has_meta and (what := what_else(tokens, self.vocab_size)):
            raise UserError(f"{path} {what}; without a meta.json it must hold uint16 ids, write it so")
        for i in range(0, len(tokens), 1 << 24):
            part = tokens[i : i + (1 << 24)]
            digest.update(part.data)
            if (top := int(part.max())) >= self.vocab_size:
                raise UserError(
                    f"{path} holds the id {top:,}, beyond the vocabulary of {self.vocab_size:,}; "
                    "prepare the data again with the right tokenizer"
                )
        if self.splits[split].get("sha256") not in (None, digest.hexdigest()):
            raise UserError(f"{path} is not the file that meta.json describes; prepare the data again")
        self.checksums[split] = digest.hexdigest()
        return self.checksums[split]

    def text_ids(self, split):
        """The ids (n,) of a split without end-of-texts, verified and in memory: what an evaluation scores."""
        self.verify(split)
        tokens = self.tokens(split)
        return np.asarray(tokens[tokens != self.eot] if self.eot >= 0 else tokens)

    def validation_ids(self):
        """What a training run evaluates. Raises UserError where that is less than an input and a target."""
        if self.validation is None:
            self.validation = self.text_ids("val") if "val" in self.paths else ()
        if len(self.validation) < 2:
            raise UserError(
                f"{self.folder} has no val split of two tokens or more; prepare one, or train without by "
                "--eval_interval=0 --patience=0"
            )
        return self.validation

    def document_ids(self, split):
        """The ids (n,) of a split with one end-of-text before each document, verified and in memory.

        nanoGPT writes it after each document, and its last one is moved to the front here. Raises UserError where the
        tokenizer has no end-of-text, or where there are not as many as meta.json says.
        """
        if self.eot < 0:
            raise UserError(f"{self.folder} has no end-of-text that would part documents; --protocol=stream needs none")
        self.verify(split)
        tokens, documents = np.asarray(self.tokens(split)), self.splits[split]["documents"]
        if documents not in (None, count := np.count_nonzero(tokens == self.eot)):
            raise UserError(
                f"{self.paths[split]} has {count:,} end-of-texts, meta.json says {documents:,}; prepare it again"
            )
        if tokens[0] == self.eot:
            return tokens
        return np.concatenate([np.array([self.eot], tokens.dtype), tokens[: -1 if tokens[-1] == self.eot else None]])


def what_else(tokens, vocab_size):
    """What a file that was opened as uint16 ids (n,) is instead, as the end of a sentence; '' for ids."""
    # Each test asks for what ids never are. Ids that are read as another type soon give a fraction or a number beyond
    # the vocabulary, so a file whose numbers all are ids has that type. Bytes may give ids in both orders. They count
    # as swapped only where an id is beyond the vocabulary as it stands, or where each is a multiple of 256.
    head = tokens[: 1 << 15].tobytes()
    for magic, what in MAGIC.items():
        if head.startswith(magic) and (len(magic) > 3 or tokens.max() >= vocab_size):
            return what
    if len(tokens) < 16:  # So few ids can be anything.
        return ""
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)  # The last character may be cut.
        if len(CONTROL.findall(head)) <= len(head) // 1000 and len(set(head)) > 2:
            return "is text"
    for kind, what in NUMBERS.items():
        if are_ids(tokens, "<" + kind, vocab_size) or are_ids(tokens, ">" + kind, vocab_size):
            return what
    swapped = are_ids(tokens, ">u2", vocab_size) and (tokens.max() >= vocab_size or not (tokens & 255).any())
    return "has its bytes in big-endian order" if swapped else ""


def are_ids(tokens, dtype, vocab_size):
    """Whether uint16 values (n,), read as numbers of another type, all are ids, and not all the same or 0."""
    numbers = tokens[: len(tokens) // 4 * 4].view(dtype)
    low, high, not_zero = vocab_size, 0, 0
    for i in range(0, len(numbers), 1 << 16):
        part = numbers[i : i + (1 << 16)]
        with np.errstate(invalid="ignore"):  # Some bytes are a signalling NaN.
            if not ((part >= 0) & (part < vocab_size) & (part == np.floor(part))).all():
                return False
        low, high, not_zero = min(low, part.min()), max(high, part.max()), not_zero + np.count_nonzero(part)
    return bool(low < high and not_zero >= 8)


def read_meta(path):
    """What a meta.json holds. Raises UserError for what could not have been written for a dataset."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        spec, vocab_size = meta["tokenizer"], meta["vocab_size"]
        tokenizer.check_spec(spec)
        if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 32 or meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError("impossible values")
        if tokenizer.vocab_size_of(spec) not in (0, vocab_size):
            raise ValueError(f"{spec[:40]!r} has not {vocab_size} ids")
        for c in meta["splits"].values():
            if not all(c[k] is None or type(c[k]) is int and 0 <= c[k] < 1 << 63 for k in COUNTS):
                raise ValueError("impossible counts")
            for k, column in c.get("per_document", {}).items():
                if (len(column), sum(column)) != (c["documents"], c[k]):
                    raise ValueError("counts of other documents")
        return meta
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable as a dataset's meta.json ({type(error).__name__}: {str(error)[:100]}); "
            "prepare the data again"
        ) from None


# ---- the batch of a step: a function of tokens, seed, block_size and the index of a sequence in the run ----


def mix64(x, key=0):
    """A 64-bit hash of uint64 values: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = np.asarray(x, np.uint64) + np.uint64(key % 2**64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*parts):
    """One 63-bit seed from several whole numbers, unrelated for neighbouring ones."""
    state = 0
    for part in parts:
        state = int(mix64(state, 0x9E3779B97F4A7C15 * (part + 1)))
    return state >> 1


def permute(index, n, key):
    """Where the permutation `key` of range(n) sends each of `index`: computed, never stored.

    A Feistel network of six rounds on the next even number of bits; a value that leaves the range is sent on until
    it is back inside (Black and Rogaway 2002, cycle walking).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out, outside = np.array(index, np.uint64), np.ones(len(index), bool)
    while outside.any():
        x = out[outside]
        left, right = x >> half, x & mask
        for r in range(6):
            left, right = right, left ^ (mix64(right, key + r * 0x9E3779B97F4A7C15) & mask)
        out[outside] = left << half | right
        outside = out >= n
    return out.astype(np.int64)


def blocks_per_epoch(n_tokens, block_size):
    """The number of sequences in an epoch, which is the same in each. Raises UserError where the text has none."""
    if n_tokens <= block_size:
        remedy = f"take block_size={n_tokens - 1} or less, or more text" if n_tokens > 1 else "prepare more text"
        raise UserError(
            f"the train split has {n_tokens:,} tokens, fewer than a block of {block_size:,} and a target; {remedy}"
        )
    return max(1, n_tokens // block_size - 1)


def sequence_starts(n_tokens, block_size, seed, index):
    """Where in the tokens the sequences `index` (counted since the start of the run) begin: int64, one for each.

    Every epoch cuts the tokens into disjoint blocks at an offset of its own, in an order of its own.
    """
    blocks = blocks_per_epoch(n_tokens, block_size)
    slack = n_tokens - 1 - blocks * block_size  # ids that an epoch leaves out, at its two ends
    index, starts = np.asarray(index, np.int64), np.empty(len(index), np.int64)
    for epoch in np.unique(index // blocks):
        here = index // blocks == epoch
        key = seed_of(seed, int(epoch))
        starts[here] = permute(index[here] % blocks, blocks, key) * block_size + key % (slack + 1)
    return starts


def batch(tokens, block_size, seed, first, count, vocab_size=1 << 32):
    """Sequences first..first+count-1 of the run: inputs and targets, int64 (count, block_size) each.

    Raises UserError for an id beyond the vocabulary. A file has one if it was overwritten after it was verified.
    """
    starts = sequence_starts(len(tokens), block_size, seed, np.arange(first, first + count))
    rows = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int64)
    if (top := int(rows.max())) >= vocab_size:
        raise UserError(
            f"the train split holds the id {top:,} now, beyond the vocabulary of {vocab_size:,}; it was overwritten "
            "while the run read it, so put the file back and go on"
        )
    return rows[:, :-1], rows[:, 1:]


# ---- evaluation windows ----


def stream_windows(n, block_size, stride=0):
    """The windows of the `stream` protocol over n ids, [(begin, end, first scored)]; each id but the first counts once.

    A window reads ids[begin:end], and its targets from `first scored` on count. With stride 0 or block_size the windows
    are disjoint, with block_size inputs and as many targets. With another stride they have block_size ids, and each
    begins `stride` after the one before, as in transformers' guide.
    """
    windows, scored, begin = [], 1, 0
    width, step = (block_size, stride) if 0 < stride < block_size else (block_size + 1, block_size)
    while scored < n:
        end = min(begin + width, n)
        windows.append((begin, end, scored))
        scored, begin = end, begin + step
    return windows


def spread(windows, size, count):
    """`count` groups of `size` windows that follow each other, spread over all windows. A count of 0 takes them all."""
    groups = [windows[i : i + size] for i in range(0, len(windows), size)]
    if not 0 < count < len(groups):
        return windows
    return [w for i in range(count) for w in groups[i * len(groups) // count]]


def document_windows(ids, eot, block_size):
    """The windows of `documents` and `lm_eval`, as stream_windows has them; each id but `eot` counts once.

    ids begins with an end-of-text and has one before each document. A document's first window reads it; a later one
    reads block_size ids, those before its targets, so that a short last one overlaps with the window before it.
    """
    windows, starts = [], np.flatnonzero(ids == eot).tolist()
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        for first in range(start + 1, stop, block_size):
            end = min(first + block_size, stop)
            windows.append((max(start, end - 1 - block_size), end, first))
    return windows


def window_batch(ids, windows, width):
    """Inputs and targets of some windows, int64 (len(windows), width) each; a target that does not count is -1."""
    x = np.zeros((len(windows), width), np.int64)
    y = np.full((len(windows), width), -1, np.int64)
    for row, (begin, end, first) in enumerate(windows):
        x[row, : end - 1 - begin] = ids[begin : end - 1]
        y[row, first - 1 - begin : end - 1 - begin] = ids[first:end]
    return x, y
