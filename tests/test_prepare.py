"""Text on its way into data/NAME: read in pieces, encoded by threads, counted, and written whole or not at all."""

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from lib import data, prepare, tokenizer
from lib.settings import UserError

import numpy as np
import pytest
from conftest import WIKITEXT, needs_wikitext, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import odd_text

COUNTS = ("tokens", "documents", "words", "lines", "bytes")

quick = settings(max_examples=60, deadline=None, database=None)


@pytest.fixture(scope="module")
def gpt2():
    return tokenizer.Gpt2Tokenizer()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a file that each example of a property writes anew."""
    return tmp_path_factory.mktemp("text") / "text.txt"


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def piece_size(size):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prepare, "PIECE", size)
        yield


def write(documents, name="d", tok=None, **options):
    """Write [(split, text)] by prepare.write, with one piece for each document."""
    return prepare.write(name, tok or tokenizer.BytesTokenizer(), ((s, t, True) for s, t in documents), 1, **options)


# ---- pieces of a file ----


@pytest.mark.parametrize("size", [3, 17, 64])
@quick
@given(text=odd_text)
@example(text=("a" + "\n" * 9 + "bc") * 20)  # runs of blanks that the end of a block parts at each place
@example(text=("a" + " " * 9 + "bc") * 20)
@example(text=("a" + "\r\n" * 4 + "bc  ") * 20)
def test_pieces_encode_as_the_whole_file(gpt2, file, size, text):
    file.write_bytes(text.encode())
    with piece_size(size):
        pieces, lasts = zip(*prepare.read_pieces(file), strict=True)
    whole = text.removeprefix("\ufeff")  # without the byte-order mark
    assert "".join(pieces) == whole
    assert lasts == (False,) * (len(pieces) - 1) + (True,)
    assert [i for p in pieces for i in gpt2.encode(p).tolist()] == gpt2.encode(whole).tolist()
    assert sum(len(p.split()) for p in pieces) == len(whole.split())


@pytest.mark.parametrize("newline", ["\n", "\r\n", " "])
def test_pieces_are_no_longer_than_they_need_to_be(file, newline):
    file.write_bytes(newline.join(f"word{i}" for i in range(1000)).encode())
    with piece_size(64):
        pieces = [text for text, _ in prepare.read_pieces(file)]
    assert max(map(len, pieces)) <= 64 + len("\r\nword999")


@quick
@given(text=odd_text, cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_span_of_a_file_is_read_alone(file, text, cuts):
    file.write_bytes(text.encode())
    first, last = sorted(int(c * len(text)) for c in cuts)
    begin, end = len(text[:first].encode()), len(text[:last].encode())
    with piece_size(7):
        found = "".join(piece for piece, _ in prepare.read_pieces(file, begin, end))
    assert found == (text[first:last] if first else text[:last].removeprefix("\ufeff"))


def test_only_the_byte_order_mark_of_the_file_is_dropped(file):
    file.write_bytes(codecs.BOM_UTF8 + "one\n\ufefftwo".encode())
    assert list(prepare.read_pieces(file)) == [("one\n\ufefftwo", True)]
    assert list(prepare.read_pieces(file, begin=7)) == [("\ufefftwo", True)]


NOT_UTF8 = [b"\xff", b"\x80", b"\xe2\x82(", b"\xf0\x9f\x98 ", b"\xc0\xaf", b"\xed\xa0\x80", "é".encode("latin-1")]


@pytest.mark.parametrize("bad", NOT_UTF8)
@pytest.mark.parametrize("offset", [0, 1, 30, 31, 32, 33, 1234])
def test_a_byte_that_is_not_utf8_is_named_by_file_and_offset(file, bad, offset):
    file.write_bytes(b"a " * (offset // 2) + b"a" * (offset % 2) + bad + b" and more text, enough for another piece")
    with piece_size(32):
        message = refusal(list, prepare.read_pieces(file))
    assert str(file) in message
    assert f"byte {offset:,} " in message


def test_a_character_cut_off_at_the_end_of_the_file_is_named(file):
    for size in range(1, 4):
        file.write_bytes(b"a" * 30 + "😀".encode()[:size])
        with piece_size(32):
            assert "byte 30 " in refusal(list, prepare.read_pieces(file))
            assert "byte 30 " in refusal(list, prepare.read_pieces(file, begin=25))


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
            text = "".join(text for text, _ in prepare.read_pieces(file))
            assert text == content.decode().removeprefix("\ufeff")
        else:
            assert f"byte {bad:,} " in refusal(list, prepare.read_pieces(file))


def test_a_file_that_becomes_shorter_is_refused(file):
    file.write_bytes(b"short")
    assert "shorter" in refusal(list, prepare.read_pieces(file, 0, 6))


class BrokenDisk(io.FileIO):
    def read(self, size=-1):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # Such an error does not name the file.


def test_a_file_on_a_broken_disk_is_named(cwd, file, monkeypatch):
    file.write_bytes(b"text")
    monkeypatch.setattr(prepare, "open", BrokenDisk, raising=False)
    pieces = (("train", text, last) for text, last in prepare.read_pieces(file))
    says = refusal(prepare.write, "d", tokenizer.BytesTokenizer(), pieces, 4)
    assert says.startswith(f"{file} can't be read (Input/output error)")
    assert data.names() == []


# ---- writing ----


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


class Wide(tokenizer.BytesTokenizer):
    """As many ids as take four bytes each."""

    spec, vocab_size, eot = "wide", 100_000, 99_999

    def encode(self, text):
        return super().encode(text).astype(np.uint32) + 70_000


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "wide"])
def test_written_files_are_those_of_the_slow_way(cwd, gpt2, kind):
    tok = {"gpt2": gpt2, "bytes": tokenizer.BytesTokenizer(), "wide": Wide()}[kind]
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


class Uneven(tokenizer.BytesTokenizer):
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
def test_a_document_in_pieces_counts_as_one(file, texts):
    tok = tokenizer.BytesTokenizer()
    with piece_size(5):
        pieces = []
        for text in texts:
            file.write_bytes(text.encode())
            pieces += [("train", piece, last) for piece, last in prepare.read_pieces(file)]
        meta = prepare.write("d", tok, iter(pieces), 1, threads=1)
    texts = [t.removeprefix("\ufeff") for t in texts]
    assert {k: meta["splits"]["train"][k] for k in COUNTS} == slow_counts(tok, texts)
    ids = [i for t in texts for i in (tok.eot, *t.encode())]
    assert data.Dataset("d").tokens("train").tolist() == ids


@needs_wikitext
def test_wikitexts_counts_are_the_published_ones(cwd, gpt2):
    with piece_size(50_000):
        pieces = (("test", text, last) for text, last in prepare.read_pieces(WIKITEXT / "wiki.test.raw"))
        counts = prepare.write("w", gpt2, pieces, 1)["splits"]["test"]
    assert [counts[k] for k in COUNTS] == [286_221, 1, 241_211, 4_358, 1_290_590]


def test_given_counts_replace_those_of_the_text(cwd):
    pieces = [
        ("val", "a b\n", False, {"words": 7}),
        ("val", "c\n", True),
        ("val", "d", True, {"lines": 3, "bytes": None}),
    ]
    meta = prepare.write("d", tokenizer.BytesTokenizer(), pieces, 1)
    assert meta == json.loads(Path("data/d/meta.json").read_text())
    assert [meta["splits"]["val"][k] for k in COUNTS] == [7, 2, 9, 5, None]
    assert meta["splits"]["val"]["per_document"] == {"words": [8, 1], "lines": [2, 3]}
    assert prepare.summary("d", meta).splitlines()[1].endswith("9 words, 5 lines")


def test_a_split_of_another_name_is_refused(cwd):
    pieces = [("train", "a", True), ("validation", "b", True)]
    with pytest.raises(UserError, match="the split 'validation'; the splits are train, val, test"):
        prepare.write("d", tokenizer.BytesTokenizer(), pieces, 1)
    assert data.names() == []


class Slow(tokenizer.BytesTokenizer):
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
        prepare.write("d", tok, pieces(), 1, threads=2)
    assert len(tok.seen) == 200
    assert max(ahead) < 12  # pieces in memory for two threads


class Failing(tokenizer.BytesTokenizer):
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


class FullDisk(io.FileIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Such an error does not name the file.


@pytest.mark.parametrize("culprit", ["train.bin", "meta.json", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(cwd, monkeypatch, culprit):
    def fail():
        with monkeypatch.context() as m:
            m.setattr(prepare, "open", on_a_full_disk if culprit != "fsync" else open, raising=False)
            m.setattr(os, "fsync", no_room if culprit == "fsync" else os.fsync)
            return refusal(write, [("train", "new"), ("val", "new")])

    def on_a_full_disk(path, mode, **options):
        return FullDisk(path, "w") if path.name == culprit else open(path, mode, **options)

    def no_room(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert fail() == "data/d can't be written (No space left on device); make room for it"
    assert os.listdir("data") == []
    write(DOCUMENTS)
    before = {p.name: p.read_bytes() for p in Path("data/d").iterdir()}
    assert "data/d can't be written" in fail()
    assert {p.name: p.read_bytes() for p in Path("data/d").iterdir()} == before


@pytest.mark.parametrize("partial", ["data/.d.partial", "data/d/.partial"])
def test_what_a_killed_preparation_left_is_no_dataset_and_no_part_of_one(cwd, partial):
    Path(partial).mkdir(parents=True)
    for name in ("train.bin", "test.bin", "meta.json"):
        Path(partial, name).write_bytes(b"cut short")
    assert data.names() == []
    refusal(data.Dataset, "d")
    write([("train", "new")])
    assert os.listdir("data") == ["d"]
    assert sorted(os.listdir("data/d")) == ["meta.json", "train.bin"]
    assert data.Dataset("d").verify("train")
    assert data.Dataset("d").text_ids("train").tolist() == list(b"new")


def test_no_text_at_all_is_refused_and_replaces_nothing(cwd):
    write(DOCUMENTS)
    refusal(write, [])
    assert data.Dataset("d").verify("train")


def test_a_new_dataset_appears_with_one_rename(cwd, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "no rename", *args)

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
        with contextlib.suppress(UserError):
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
            raise OSError(errno.EIO, "cut short", *args)
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


@pytest.fixture
def own_disk(monkeypatch):
    """Nothing can be renamed into data/d or out of it, as where that folder is the root of a disk."""
    root = Path("data/d").absolute()
    for move in (os.rename, os.replace):

        def checked(source, target, move=move):
            if (root in Path(source).absolute().parents) != (root in Path(target).absolute().parents):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))
            move(source, target)

        monkeypatch.setattr(os, move.__name__, checked)


@pytest.mark.parametrize("old", [[], DOCUMENTS])
def test_a_folder_that_is_a_disk_of_its_own_is_filled(cwd, own_disk, old):
    Path("data/d").mkdir(parents=True)
    for documents in filter(None, (old, [("train", "new"), ("val", "new too")])):
        write(documents)
    assert readable() == {"train": "new", "val": "new too"}
    assert os.listdir("data") == ["d"]
    assert sorted(os.listdir("data/d")) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_may_be_a_link(cwd, exists):
    Path("large").mkdir()
    if exists:
        Path("large/other").mkdir()
    Path("data").mkdir()
    Path("data/d").symlink_to(Path("large/other").absolute())
    write([("train", "new")])
    assert readable() == {"train": "new"}
    assert Path("data/d").is_symlink()
    assert os.listdir("large") == ["other"]
    assert sorted(os.listdir("large/other")) == ["meta.json", "train.bin"]


# ---- preparing what is missing ----


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
    shutil.copytree(Path(prepare.__file__).parent, "lib")
    Path("prepare_demo.py").write_text(PREPARE_DEMO)
    code = "from lib import data, prepare; open('ready{}', 'w').close(); prepare.ensure('demo'); data.Dataset('demo')"
    both = [subprocess.Popen([sys.executable, "-c", code.format(i)], stdout=subprocess.DEVNULL) for i in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert Path("runs").read_text() == "once\n"


def test_a_script_that_fails_is_one_line(cwd, monkeypatch):
    monkeypatch.setattr(prepare, "__file__", str(cwd / "lib" / "prepare.py"))
    Path("prepare_demo.py").write_text("raise SystemExit(3)")
    assert "prepare_demo.py did not finish" in refusal(prepare.ensure, "demo")
    write(DOCUMENTS, name="demo")
    prepare.ensure("demo")  # The dataset exists now, and nothing runs.


@pytest.mark.parametrize("name", ["books", "shelf/books"])
def test_a_dataset_without_a_script_is_left_to_dataset(cwd, name):
    prepare.ensure(name)
    assert "there is no dataset" in refusal(data.Dataset, name)
    write([("train", "ab")], name=name)
    prepare.ensure(name)
    assert data.Dataset(name).text_ids("train").tolist() == list(b"ab")


def test_a_folder_of_nanogpt_s_without_its_data_names_the_script_that_writes_them(cwd):
    Path("data/openwebtext").mkdir(parents=True)
    Path("data/openwebtext/prepare.py").write_text("")
    says = refusal(data.Dataset, "openwebtext")
    assert says == "data/openwebtext has no train.bin yet; `python data/openwebtext/prepare.py` writes it"


def test_the_answer_of_the_server_behind_a_library_s_error_is_said():
    class Refused(Exception):
        response = SimpleNamespace(status_code=429)

    def read():
        with prepare.one_line("it can't be read", "try again"):
            try:
                raise Refused
            except Refused as error:
                raise FileNotFoundError("x" * 999) from error

    says = f"it can't be read (FileNotFoundError: {'x' * 200}, and the server has answered 429); try again"
    assert refusal(read) == says


@pytest.mark.parametrize("order", [(2, None), (None, 2), (None, None)])
def test_a_count_that_a_part_does_not_know_is_unknown_for_the_whole(order):
    total = {}
    for lines in order:
        prepare.add_counts(total, {"words": 3, "lines": lines})
    assert total == {"words": 6, "lines": None}


def test_the_splits_stand_in_one_order_whichever_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = prepare.write("a", tokenizer.BytesTokenizer(), [(s, "x", True) for s in reversed(data.TOKEN_FILES)], 1)
    assert list(meta["splits"]) == list(data.TOKEN_FILES)
