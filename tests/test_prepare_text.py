"""prepare_text.py: the files and their order, the two splits, and what a mistake leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import prepare_text
from lib import data, tokenizer

import conftest
import numpy as np
import pytest
from conftest import ROOT

BYTES = tokenizer.BytesTokenizer()


def write(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def documents(split, tok=BYTES):
    return conftest.documents("mine", split, tok)


def all_documents():
    """The documents of both splits in alphabetical order."""
    return sorted(documents("train") + documents("val"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepare(script):
    """prepare("a.txt", ...) makes data/mine with the bytes tokenizer, and returns the standard output of the script."""

    def prepare(*args):
        status, out, err = script("prepare_text", *args, "--dataset=mine", "--tokenizer=bytes")
        assert status == 0, err
        return out

    return prepare


@pytest.fixture
def mistake(script):
    """mistake("a.txt", ...) is the line with which the script ends for the dataset `mine`."""

    def mistake(*args):
        status, _, err = script("prepare_text", *args, "--dataset=mine", "--tokenizer=bytes")
        assert status == 2
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return mistake


# ---- which files ----

TREE = {
    "texts/b.txt": "second",
    "texts/a/z.txt": "first",
    "texts/c.md": "third, Markdown",
    "texts/d/e/f.txt": "fourth",
    "texts/.hidden.txt": "hidden",
    "texts/.git/config.txt": "hidden folder",
    "texts/d/.cache/g.txt": "hidden further down",
    "other.txt": "other",
}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["texts"], ["first", "second", "third, Markdown", "fourth"]),
        (["texts/"], ["first", "second", "third, Markdown", "fourth"]),
        (["texts/b.txt", "other.txt", "texts/a/z.txt"], ["second", "other", "first"]),
        (["texts/*.txt", "other.txt"], ["second", "other"]),
        (["texts/**/*.txt"], ["first", "second", "fourth"]),
        (["other.txt", "texts/b.txt", "texts", "*.txt"], ["other", "second", "first", "third, Markdown", "fourth"]),
        (["texts/.hidden.txt", "other.txt"], ["hidden", "other"]),  # A file that is named is wanted.
        (["texts/d/.cache", "other.txt"], ["hidden further down", "other"]),
        (["texts/d/../b.txt", "texts/../other.txt"], ["second", "other"]),
        (["../here/texts/d/../a", "../here/other.txt"], ["first", "other"]),
        (["../../tree/here/texts/b.txt", "../../tree/here/texts/d"], ["second", "fourth"]),
    ],
)
def test_files_folders_and_globs_give_documents_in_their_order(prepare, monkeypatch, folder, paths, expected):
    here = folder / "tree" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    write(TREE)
    prepare(*paths, "--val_fraction=0")
    assert documents("train") == expected


def test_a_folder_of_files_under_a_hidden_folder_is_read(prepare, folder):
    write({".cache/texts/a.txt": "one", ".cache/texts/.b.txt": "hidden", ".cache/c.txt": "two"})
    prepare(folder / ".cache/texts", folder / ".cache/c.txt", "--val_fraction=0")
    assert documents("train") == ["one", "two"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(prepare):
    write({"a[1].txt": "brackets", "a1.txt": "no brackets"})
    prepare("a[1].txt", "--val_fraction=0")
    assert documents("train") == ["brackets"]


def test_empty_files_are_left_out_and_that_is_said(prepare):
    write({"t/a.txt": "one", "t/b.txt": "", "t/c.txt": "", "t/d.txt": "two"})
    assert "left out 2 empty files, such as t/b.txt" in prepare("t", "--val_fraction=0")
    assert documents("train") == ["one", "two"]
    assert "left out" not in prepare("t/a.txt", "t/d.txt", "--overwrite=True")


# ---- what the dataset holds ----


@pytest.mark.parametrize("kind", [tokenizer.BytesTokenizer, tokenizer.Gpt2Tokenizer])
def test_the_tokenizer_is_the_one_asked_for(script, kind):
    texts = {"a.txt": "The first – page.\n", "b.txt": "\n  Straße\r\n", "c.txt": "<|endoftext|> as text\n"}
    write(texts)
    asked = [f"--tokenizer={kind.spec}"] if kind.spec != "gpt2" else []  # gpt2 is the default.
    assert script("prepare_text", *texts, "--dataset=mine", "--val_fraction=0", *asked)[0] == 0
    assert data.Dataset("mine").tokenizer_spec == kind.spec
    assert documents("train", kind()) == list(texts.values())


def test_the_counts_are_those_of_the_text(prepare):
    texts = ["Two words.\nÜ\n", "  no line end", "\n\n"]
    write({f"{i}.txt": text for i, text in enumerate(texts)})
    prepare("0.txt", "1.txt", "2.txt", "--val_fraction=0")
    counts = data.Dataset("mine").splits["train"]
    sizes = [len(text.encode()) for text in texts]
    assert counts["documents"] == 3
    assert counts["words"] == sum(len(text.split()) for text in texts)
    assert counts["lines"] == sum(len(text.splitlines()) for text in texts)
    assert counts["bytes"] == counts["tokens"] == sum(sizes)


def test_the_summary_says_what_was_made_and_how_to_train_on_it(prepare):
    write({"a.txt": "one\n" * 500, "b.txt": "two\n"})
    out = prepare("a.txt", "b.txt")
    assert "data/mine: tokenizer bytes, 257 ids" in out
    assert out.splitlines()[-1] == "python train.py --dataset=mine"
    for split, counts in json.loads(Path("data/mine/meta.json").read_text())["splits"].items():
        line = next(line for line in out.splitlines() if line.strip().startswith(split))
        assert all(f"{counts[k]:,} {k}" in line for k in data.COUNTS)


@pytest.mark.parametrize(
    "content",
    [
        "one<|end|>two\n<|end|>\nthree\n",
        "<|end|>\none\r\n<|end|>\r\ntwo<|end|><|end|>\n<|end|>three<|end|>",
        "one\n\n<|end|>\n\ntwo<|end|>three",
        "\ufeff<|end|>one<|end|>two<|end|>three",
        "\ufeffone<|end|>two<|end|>three",
    ],
)
def test_a_separator_parts_documents_and_takes_the_line_ends_around_it(prepare, content):
    write({"a.txt": content, "b.txt": "four\n\nstill four"})
    prepare("a.txt", "b.txt", "--separator=<|end|>", "--val_fraction=0")
    assert documents("train") == ["one", "two", "three", "four\n\nstill four"]


def test_documents_of_one_file_are_shared_out_whole(prepare):
    texts = [f"Märchen {i}\n\n und {i}" for i in range(40)]
    write({"a.txt": "\n<|endoftext|>\n".join(texts)})
    prepare("a.txt", "--separator=<|endoftext|>", "--val_fraction=0.2")
    assert documents("val") == [text for text in texts if text in documents("val")]  # in their order in the file
    assert documents("train") == [text for text in texts if text not in documents("val")]
    assert len(documents("val")) == 8


@pytest.mark.parametrize("size", [3_000_000, 1 << 20])
@pytest.mark.parametrize("unit", ["ab ", "x", "日本語"])
def test_a_file_of_megabytes_without_a_line_end_is_read_whole(prepare, unit, size):
    text = (unit * (size // len(unit.encode()) + 1)).encode()[:size].decode(errors="ignore")
    write({"a.txt": text})
    prepare("a.txt", "--val_fraction=0")
    ids = data.Dataset("mine").tokens("train")
    assert ids[0] == BYTES.eot
    assert ids[1:].astype(np.uint8).tobytes() == text.encode()


# ---- the validation split ----


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 10, 200])
def test_the_validation_split_is_about_the_share_asked_for_and_never_none_or_all(count, fraction):
    sizes = np.random.default_rng(count).integers(1, 1000, size=count)
    for seed in range(20):
        chosen = prepare_text.draw_validation(sizes, fraction, seed)
        assert chosen.shape == (count,)
        assert chosen.any()
        assert not chosen.all()
        # The share is right to within one document.
        assert abs(sizes[chosen].sum() - fraction * sizes.sum()) <= sizes.max()


def test_documents_go_whole_to_a_split_drawn_by_seed(prepare):
    texts = {f"t/{i:02}.txt": f"document {i}\n" for i in range(50)}
    write(texts)
    drawn = []
    for seed in (1, 1, 2):
        prepare("t", "--val_fraction=0.1", f"--seed={seed}", "--overwrite=True")
        drawn.append(documents("val"))
        assert len(drawn[-1]) == 5
        assert documents("train") == [text for text in texts.values() if text not in drawn[-1]]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_two_documents_are_one_for_each_split(prepare, fraction):
    write({"a.txt": "the longer one\n", "b.txt": "short\n"})
    prepare("a.txt", "b.txt", f"--val_fraction={fraction}")
    assert all_documents() == ["short\n", "the longer one\n"]


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
@pytest.mark.parametrize(("lines", "fraction"), [(1000, 0.1), (1000, 0.01), (1000, 0.7), (3, 0.01), (2, 0.5), (2, 0.9)])
def test_of_a_single_document_the_last_lines_are_the_validation_split(prepare, lines, fraction, end):
    """The two parts make up the text. It is cut at a line end, at most a line away from the share asked for."""
    text = (end or "\n").join(f"Zeile äöü {i}" for i in range(lines)) + end
    write({"a.txt": text})
    prepare("a.txt", f"--val_fraction={fraction}")
    (train,), (val,) = documents("train"), documents("val")
    assert train + val == text
    assert train.endswith("\n")
    assert val
    longest = max(len(line.encode()) for line in text.splitlines(keepends=True))
    assert abs(len(val.encode()) - fraction * len(text.encode())) <= longest


def test_a_single_document_among_separators_and_empty_files_is_cut_too(prepare):
    write({"a.txt": "", "b.txt": "<|end|>\n", "c.txt": "<|end|>" + "line\n" * 100 + "last<|end|>\n"})
    prepare("a.txt", "b.txt", "c.txt", "--separator=<|end|>", "--val_fraction=0.1")
    (train,), (val,) = documents("train"), documents("val")
    assert train + val == "line\n" * 100 + "last"


def test_a_val_fraction_of_0_makes_no_validation_split(prepare):
    write({"a.txt": "one line alone", "b.txt": "two\n"})
    prepare("a.txt", "b.txt")
    assert sorted(data.Dataset("mine").splits) == ["train", "val"]
    prepare("a.txt", "b.txt", "--val_fraction=0", "--overwrite=True")
    assert documents("train") == ["one line alone", "two\n"]
    assert sorted(p.name for p in Path("data/mine").iterdir()) == ["meta.json", "train.bin"]


# ---- memory ----


def peak_memory(megabytes):
    """The peak memory of the script in bytes for a text of this size, with Python and numpy."""
    line = "Die Größe des Textes sind viele MB, und keine Zeile ist wie die andere.\n"
    with open("big.txt", "w", encoding="utf-8") as f:
        for _ in range(megabytes):
            f.write(line * ((1 << 20) // len(line.encode())))
    command = [sys.executable, str(ROOT / "prepare_text.py"), "big.txt", "--dataset=big", "--tokenizer=bytes"]
    # The memory of this large process would count for a child that is forked from it. So another process is in between.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    arguments = [sys.executable, "-c", measure, *command, "--threads=2", "--overwrite=True"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    splits = data.Dataset("big").splits
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == Path("big.txt").stat().st_size > 0.99e6 * megabytes
    return int(done.stdout.rpartition("peak ")[2]) * (1 if sys.platform == "darwin" else 1024)


def test_the_memory_needed_does_not_grow_with_the_text():
    small, large = peak_memory(16), peak_memory(64)
    assert large < 400e6
    assert large - small < 32e6


# ---- mistakes ----


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.txt", b"word"),
        ("b.txt", b"x" * (1 << 20)),
        ("b.txt", b"x" * ((1 << 21) + 77)),
        ("b.txt", b"x" * ((1 << 20) - 1) + "über".encode()),  # two bytes of one character in two reads
    ],
)
def test_bytes_that_are_not_utf8_are_named_by_file_and_offset_and_leave_no_dataset(mistake, name, before):
    write({"a.txt": "fine\n" * 9, "b.txt": "fine\n", "c.txt": "fine\n", name: before + b"\xe9\n" + b"x" * 99})
    said = mistake("a.txt", "b.txt", "c.txt")
    assert said.startswith(f"prepare_text.py: {name}: byte {len(before):,} is not UTF-8")
    assert data.names() == []
    assert not Path("data/mine").exists()


def test_a_mistake_leaves_an_older_dataset_as_it_was(prepare, mistake):
    write({"a.txt": "one\n", "b.txt": "two\n", "c.txt": b"\xff\n"})
    prepare("a.txt", "b.txt")
    before = {p: p.read_bytes() for p in Path("data/mine").iterdir()}
    assert "c.txt: byte 0" in mistake("a.txt", "b.txt", "c.txt", "--overwrite=True")
    assert {p: p.read_bytes() for p in Path("data/mine").iterdir()} == before


def test_a_dataset_that_is_there_is_replaced_only_when_asked(prepare, mistake):
    write({"a.txt": "one\n", "b.txt": "two\n", "c.txt": "three\n"})
    prepare("a.txt", "b.txt")
    assert mistake("b.txt", "c.txt").endswith("data/mine exists already; --overwrite=True replaces it")
    assert all_documents() == ["one\n", "two\n"]
    prepare("b.txt", "c.txt", "--overwrite=True")
    assert all_documents() == ["three\n", "two\n"]


def test_the_text_may_lie_in_the_folder_of_the_dataset(prepare):
    """In nanoGPT, data/shakespeare_char/input.txt does."""
    text = "one\ntwo\nthree\n" * 50
    write({"data/mine/input.txt": text})
    prepare("data/mine/input.txt")
    assert "".join(documents("train") + documents("val")) == text
    assert Path("data/mine/input.txt").read_text() == text


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a/", "/a", ".a", ".", ".."])
def test_a_dataset_takes_a_plain_name(script, folder, name):
    write({"a.txt": "one\n", "b.txt": "two\n"})
    status, out, err = script("prepare_text", "a.txt", "b.txt", "--tokenizer=bytes", f"--dataset={name}")
    assert (status, out) == (2, "")
    assert f"--dataset={name}: give the data a name" in err
    assert len(err.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt"]


def test_no_name_is_a_mistake(script):
    write({"a.txt": "one\n"})
    status, _, err = script("prepare_text", "a.txt")
    assert (status, err) == (2, "prepare_text.py: --dataset=: give the data a name, such as --dataset=books\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "name the files"),
        (["a.txt", "nothing.txt"], "nothing.txt: there is no such file, folder or glob"),
        (["*.md"], "*.md: there is no such file, folder or glob"),
        (["empty.txt"], "these paths hold no text"),
        (["folder"], "these paths hold no text"),
        (["ends.txt", "--separator=<|end|>"], "nothing but separators"),
        (["a.txt"], "a.txt is one line"),
        (["a.txt", "--val_fraction=1"], "val_fraction=1.0"),
        (["a.txt", "--val_fraction=-0.1"], "val_fraction=-0.1"),
        (["a.txt", "--threads=-1"], "threads=-1"),
        (["a.txt", "--seed=-1"], "seed=-1"),
        (["a.txt", "--overwrite=yes"], "overwrite takes True or False"),
        (["a.txt", "--separater=x"], "the nearest is 'separator'"),
    ],
)
def test_a_mistake_says_what_is_wrong_and_leaves_no_dataset(mistake, args, says):
    write({"a.txt": "one line\n", "empty.txt": "", "ends.txt": "<|end|>\n<|end|>\n"})
    Path("folder").mkdir()
    assert says in mistake(*args)
    assert data.names() == []
