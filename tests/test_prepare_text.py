"""prepare_text.py: the files and their order, text and records, the two splits, and what a mistake leaves behind."""

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import prepare_text
import train
from lib import data, settings, text, tokenizer

import conftest
import numpy as np
import pytest
from conftest import ROOT
from hub import Hub, card, parquet, run_each

BYTES = tokenizer.BytesTokenizer()


def write(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def no_temporary_files():
    return not [p for p in Path("data").rglob(".*") if p.suffix != ".lock"]


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

    def prepare(*args, stdin=b""):
        status, out, err = script("prepare_text", *args, "--dataset=mine", "--tokenizer=bytes", stdin=stdin)
        assert status == 0, err
        return out

    return prepare


@pytest.fixture
def mistake(script):
    """mistake("a.txt", ...) is the line with which the script ends for the dataset `mine`."""

    def mistake(*args, stdin=b""):
        status, _, err = script("prepare_text", *args, "--dataset=mine", "--tokenizer=bytes", stdin=stdin)
        assert status == 2
        assert "Traceback" not in err
        assert no_temporary_files()
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
    assert "left out 2 empty files, the first is t/b.txt" in prepare("t", "--val_fraction=0")
    assert documents("train") == ["one", "two"]
    assert "left out 1 empty file, " in prepare("t/a.txt", "t/b.txt", "--val_fraction=0", "--overwrite=True")
    assert "left out" not in prepare("t/a.txt", "t/d.txt", "--overwrite=True")


def test_linked_folders_are_followed_and_a_circle_ends(prepare):
    write({"texts/a.txt": "one", "other/b.txt": "two", "other/deep/c.txt": "three"})
    Path("texts/linked").symlink_to(Path("other").absolute())
    Path("texts/up").symlink_to("..")
    Path("other/deep/round").symlink_to("../..")
    Path("texts/nowhere").symlink_to("gone")
    assert "left out 1 link to nowhere, the first is texts/nowhere" in prepare("texts", "--val_fraction=0")
    assert sorted(documents("train")) == ["one", "three", "two"]


def test_a_folder_that_can_t_be_read_is_not_left_out_unsaid(mistake, monkeypatch):
    write({"texts/a.txt": "one", "texts/deep/b.txt": "two"})
    walk = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert mistake("texts") == "prepare_text.py: texts/deep: Permission denied; mend that, or name another"


# ---- text in other forms ----

TEXT = "Zeile äöü 😀\n" * 5_000 + "\ufeffende"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_says_the_encoding(prepare, monkeypatch, encoding, packed):
    monkeypatch.setattr("lib.prepare.PIECE", 1001)  # Blocks end within characters.
    content = TEXT.encode(encoding)
    write({"a.txt.gz" if packed else "a.txt": gzip.compress(content) if packed else content})
    prepare("a.txt*", "--val_fraction=0")
    assert documents("train") == [TEXT]
    assert no_temporary_files()


def test_utf16_of_either_order_is_parted_and_cut_as_utf8_is(prepare):
    content = "one<|end|>\r\ntwo"
    little, big = b"\xff\xfe" + content.encode("utf-16-le"), b"\xfe\xff" + content.encode("utf-16-be")
    write({"a.txt": little, "b.txt": big})
    prepare("a.txt", "b.txt", "--separator=<|end|>", "--val_fraction=0")
    assert documents("train") == ["one", "two", "one", "two"]
    write({"a.txt": "".join(f"line {i}\n" for i in range(100)).encode("utf-16")})
    prepare("a.txt", "--val_fraction=0.1", "--overwrite=True")
    assert documents("train")[0] + documents("val")[0] == "".join(f"line {i}\n" for i in range(100))


def test_standard_input_is_text(prepare, mistake):
    out = prepare("-", "--val_fraction=0.2", stdin=b"one\ntwo\nthree\nfour\nfive\n")
    assert documents("train") + documents("val") == ["one\ntwo\nthree\nfour\n", "five\n"]
    assert "the last 5 bytes of a document of standard input" in out
    write({"a.txt": "file"})
    prepare("a.txt", "-", "--val_fraction=0", "--overwrite=True", stdin="pipe".encode("utf-16"))
    assert documents("train") == ["file", "pipe"]
    assert mistake("-", "--overwrite=True", stdin=b"caf\xe9").startswith("prepare_text.py: standard input: byte 3 is")
    for nothing in (b"", codecs.BOM_UTF8):
        assert "what is named holds no text" in mistake("-", "--overwrite=True", stdin=nothing)
    assert no_temporary_files()


def test_a_pipe_is_read_once(prepare):
    os.mkfifo("pipe")
    text = "".join(f"line {i}\n" for i in range(30_000))
    writer = threading.Thread(target=Path("pipe").write_text, args=(text,))
    writer.start()
    prepare("pipe", "--val_fraction=0.1")
    writer.join()
    assert documents("train")[0] + documents("val")[0] == text


# ---- what is not text ----

MIXED = {
    "t/a.docx": b"PK\x03\x04\xff\xfe",
    "t/b.txt": "café".encode("latin-1"),
    "t/c.txt": "no mark".encode("utf-16-le"),
    "t/d.txt": "fine",
    "t/e.txt.gz": gzip.compress(b"packed")[:-9],
    "t/f.jsonl": '{"body": "x", "n": 1}\n',
    "t/g.json": "[1, 2",
    "t/h.txt": "fine too",
}


def test_all_that_is_not_text_is_named_in_one_message(mistake):
    write(MIXED)
    says = mistake("t")
    assert "6 of 8 files are not text: t/a.docx: byte 4 is not UTF-8 (it looks binary), t/b.txt: byte 3 is not" in says
    assert "t/e.txt.gz can't be read" in says
    assert "t/f.jsonl has no column 'text' (there: body, n) and 1 more; " in says
    for remedy in ("plain text", "iconv -f LATIN1 -t UTF-8", "iconv -f UTF-16LE", "--column=NAME", "--skip=True"):
        assert says.count(remedy) == 1
    assert data.names() == []
    one = mistake("t/b.txt", "t/d.txt")
    assert one.startswith("prepare_text.py: t/b.txt: byte 3 is not UTF-8; iconv -f LATIN1 -t UTF-8 OLD > NEW")
    assert "--skip=True" in one


PACKED, PNG = gzip.compress(b"one\n", mtime=0), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
TAR = b"a.txt".ljust(512, b"\0") + b"one\n".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("-", PACKED, "(it is gzip); gunzip it first"),
        ("a.md", PACKED, "(it is gzip); gunzip it first"),
        ("a.png", PNG, "name files of plain text"),
        ("a.docx", b"PK\x03\x04 a zip\xff", "name files of plain text"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\nstream\n\x01\x02", "name files of plain text"),
        ("a.tar", TAR, "name files of plain text"),
        ("a.txt", "no mark".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 OLD > NEW converts UTF-16"),
        ("a.txt", "a\ud800b".encode("utf-16", "surrogatepass"), "put a sound copy in its place"),
        ("a.txt", "x" * 99_999 + "café\t\f\r\n", "iconv -f LATIN1 -t UTF-8 OLD > NEW converts Latin-1"),
        ("a.csv", "text\n" + "x\n" * 99_999 + "café\n", "iconv -f LATIN1 -t UTF-8 OLD > NEW converts Latin-1"),
        ("a.json", '[{"text": "café"}]', "iconv -f LATIN1 -t UTF-8 OLD > NEW converts Latin-1"),
        ("a.jsonl", '{"text": "café"}\n', "iconv -f LATIN1 -t UTF-8 OLD > NEW converts Latin-1"),
        ("a.tsv", "text\tn\ncafé\t1\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 OLD > NEW converts UTF-16"),
        ("a.csv", PACKED, "(it is gzip); gunzip it first"),
        ("a.txt.xz", lzma.compress(b"text"), "(it is xz); unxz it first"),
        ("a.txt.bz2", bz2.compress(b"text" * 999), "(it is bzip2); bunzip2 it first"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd\x04\x00", "(it is zstd); unzstd it first"),
        ("a.arrow", b"\xff\xff\xff\xff\xa0\0\0\0", "load_from_disk(FOLDER).to_parquet(NEW) converts it"),
        ("a.csv", 'id;text\n"1;a\n', "in which commas must part the fields"),
    ],
)
def test_what_is_not_text_is_answered_by_what_it_is(mistake, name, content, remedy):
    content = content if isinstance(content, bytes) else content.encode("latin-1")
    write({name: content, "b.txt": "fine"})
    said = mistake(name, stdin=content)
    assert remedy in said and said.count("iconv") == remedy.count("iconv") and "--skip=True" not in said
    said = mistake(name, "b.txt", stdin=content)
    assert remedy in said and said.endswith(", and --skip=True leaves out what is not text")


def test_skip_leaves_out_what_is_not_text_and_counts_it(prepare, mistake):
    write(MIXED)
    assert "left out 6 of 8 files for not being text: t/a.docx: byte 4" in prepare("t", "--skip=True")
    assert all_documents() == ["fine", "fine too"]
    assert "none of these files is text" in mistake("t/a.docx", "t/b.txt", "--skip=True", "--overwrite=True")


def test_a_separator_that_is_in_none_of_the_files_is_a_mistake(mistake):
    write({"a.txt": "one <|END|> two", "b.csv": "text\none <|end|> two\n"})
    assert "--separator='<|end|>' is in none of these files" in mistake("a.txt", "b.csv", "--separator=<|end|>")


class FullDisk(io.FileIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Such an error does not name the file.


@pytest.mark.parametrize("name", ["-", "a.jsonl"])
def test_a_full_disk_under_the_temporary_files_is_one_line(mistake, monkeypatch, name):
    write({"a.jsonl": '{"text": "one"}\n'})
    real = open
    monkeypatch.setattr(
        text, "open", lambda path, mode: FullDisk(path, "w") if mode == "wb" else real(path, mode), raising=False
    )
    says = mistake(name, "--skip=True", stdin=b"one\ntwo\n")
    assert says == "prepare_text.py: data/mine can't be written (No space left on device); make room for it"


# ---- records ----

RECORDS = ["one é", 'two\n\n"lines", of it\n', "12", "NA", "", "null", " six ", "2020-01-01 and more"]


def record_files():
    rows = [{"n": i, "text": text} for i, text in enumerate(RECORDS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    quoted = ['"' + text.replace('"', '""') + '"\n' for text in RECORDS]
    csv, tsv = (f"n{d}text\n" + "".join(f"{i}{d}{text}" for i, text in enumerate(quoted)) for d in ",\t")
    return {
        "a[1].jsonl": lines.encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.ndjson": lines.encode(),
        "a.csv": csv.encode(),
        "a.tsv": tsv.encode(),
        "a.parquet": parquet(RECORDS),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a[1].jsonl", "a.json", "a.ndjson", "a.csv", "a.tsv", "a.parquet"])
def test_a_record_is_a_document(prepare, name, packed):
    content = record_files()[name]
    write({name + ".gz" * packed: gzip.compress(content) if packed else content})
    said = prepare(name + ".gz" * packed, "--val_fraction=0")
    assert documents("train") == [text for text in RECORDS if text]
    assert f"{name + '.gz' * packed}: left out 1 record without text\n" in said
    assert no_temporary_files()


def test_a_parquet_file_without_rows_is_no_mistake(prepare):
    """Data sets of many files have such shards."""
    write({"a.parquet": parquet([]), "b.parquet": parquet(["one", "two"])})
    prepare("a.parquet", "b.parquet", "--val_fraction=0")
    assert documents("train") == ["one", "two"]


def test_records_and_text_may_be_mixed_and_the_column_named(prepare):
    write({"a.csv": "body,text\none,x\ntwo,y\n", "b.txt": "three", "c.jsonl": '{"body": "four"}\n{"body": null}\n'})
    prepare("a.csv", "b.txt", "c.jsonl", "--column=body", "--val_fraction=0")
    assert documents("train") == ["one", "two", "three", "four"]


def test_records_without_text_are_counted(prepare):
    write({"a.jsonl": '{"text": "x"}\n{"n": 1}\n{"text": ""}\n{"text": " \\n"}\n', "b.jsonl": '{"text": "y"}\n'})
    said = prepare("a.jsonl", "b.jsonl", "--val_fraction=0")
    assert said.count("left out") == 1 and "a.jsonl: left out 3 records without text\n" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"body": "x", "id": 1}\n', "a.jsonl has no column 'text' (there: body, id); --column=NAME takes another"),
        ('{"text": 12, "body": "x"}\n', "its column 'text' holds int values and not text (there: text, body)"),
        ('{"text": ["x"]}\n', "its column 'text' holds list values"),
        ('{"text": "x"}\n{"text": \n', "a.jsonl can't be read as records of json (ArrowInvalid"),
        ('{"text": null}\n', "what is named holds no text"),
        ('{"data": [{"text": "x"}]}\n', "(there: data); write .jsonl whose records have a field of text"),
    ],
)
def test_records_that_hold_no_text_are_one_line(mistake, content, says):
    write({"a.jsonl": content})
    assert says in mistake("a.jsonl", "--val_fraction=0")
    assert data.names() == []


def test_a_library_that_can_t_be_loaded_is_one_line(mistake, monkeypatch):
    write({"a.jsonl": '{"text": "one"}'})
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "the library datasets can't be loaded (ModuleNotFoundError" in mistake("a.jsonl")


def run_all(endpoint, *commands):
    """[(exit status, standard error)] of the script with the arguments of each command, against a hub."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HOME": os.getcwd(), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        env.pop(name, None)
    return run_each([[str(ROOT / "prepare_text.py"), "--tokenizer=bytes", *args] for args in commands], env)


def test_files_of_records_ask_no_hub_and_leave_no_cache():
    write(record_files())
    with Hub({}) as hub:
        [(status, err)] = run_all(hub.url, [*record_files(), "--dataset=mine"])
        assert (status, hub.answers) == (0, []), err
    assert len(all_documents()) == 7 * len(record_files())
    assert not Path(".cache").exists()


SOURCES = {"mine": "hub:own/er:c", "d": "hub:own/er:d", "no": "hub:own/er", "none": "hub:own/none"}


def test_a_data_set_of_the_hub_is_streamed_with_its_own_splits(mistake):
    write({"own/er/train.txt": "not this folder"})
    rows = {"train": ["one\n", "", "two"], "validation": ["three", "four"], "test": ["five"], "more": ["six"]}
    files = {f"c/{split}-0.parquet": parquet(texts, "body") for split, texts in rows.items()}
    files["README.md"] = card({"c": ("c", rows), "d": ("c", ["train"])})
    with Hub({"datasets/own/er": files}) as hub:
        commands = [[source, f"--dataset={name}", "--column=body"] for name, source in SOURCES.items()]
        ended = run_all(hub.url, *commands)
        assert [status for status, _ in ended] == [0, 0, 2, 2], ended
    said = {name: err for name, (_, err) in zip(SOURCES, ended, strict=True)}
    assert [documents(split) for split in data.SPLITS] == [["one\n", "two"], ["three", "four"], ["five"]]
    assert sorted(data.Dataset("d").splits) == ["train", "val"]
    # README.md alone is downloaded. The rest is read in parts, and the split that is not used is not read.
    assert sorted(p.name for p in Path(".cache/huggingface").iterdir()) == ["hub"]
    assert {p.name for p in Path(".cache").rglob("snapshots/*/*")} == {"README.md"}
    assert "among the available configs: ['c', 'd']" in said["no"].splitlines()[-1]
    assert "hub:own/none can't be had from the hub (DatasetNotFoundError" in said["none"].splitlines()[-1]
    assert not any("Traceback" in err for err in said.values())
    assert "hub:own: write hub:OWNER/NAME" in mistake("hub:own", "--overwrite=True")
    assert no_temporary_files()


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
    assert out.splitlines()[-1] == "python train.py config/text_small.py --dataset=mine --out_dir=out/mine"
    for split, counts in json.loads(Path("data/mine/meta.json").read_text())["splits"].items():
        line = next(line for line in out.splitlines() if line.strip().startswith(split))
        assert all(f"{counts[k]:,} {k if counts[k] > 1 else k[:-1]}" in line for k in data.COUNTS)


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


def test_a_long_line_is_cut_at_white_space(prepare):
    text = "anarchism originated as a term of abuse first used " * 60_000  # 3 MB, as text8 is written
    write({"a.txt": text})
    prepare("a.txt")
    (train,), (val,) = documents("train"), documents("val")
    assert train + val == text
    assert val[0] == " " and not train[-1].isspace()
    assert abs(len(val) - 0.01 * len(text)) < 12


def test_a_short_first_line_does_not_give_the_rest_to_validation(prepare):
    write({"a.txt": "title\n" + "word " * 10_000})
    prepare("a.txt", "--val_fraction=0.1")
    assert len(documents("val")[0]) == pytest.approx(5_000, abs=5)


@pytest.mark.parametrize("newline", ["\n", " "])
@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (3, 0.1), (9, 0.05)])
def test_where_whole_documents_miss_the_share_one_is_cut(prepare, count, fraction, newline):
    texts = {f"{i}.txt": newline.join(f"word{i}" for _ in range(2_000)) for i in range(count)}
    write(texts)
    out = prepare(*texts, f"--val_fraction={fraction}")
    (val,) = documents("val")
    share = fraction * sum(map(len, texts.values()))
    assert abs(len(val) - share) <= len("word0 ")
    (cut,) = set(documents("train")) - set(texts.values())
    assert sorted([text for text in documents("train") if text != cut] + [cut + val]) == sorted(texts.values())
    assert f"the validation split is the last {len(val):,} bytes of a document of " in out


def test_documents_that_meet_the_share_are_not_cut(prepare):
    texts = {f"{i}.txt": "word\n" * 2_000 for i in range(10)}
    write(texts)
    assert "the validation split is" not in prepare(*texts, "--val_fraction=0.1")
    assert documents("val") == ["word\n" * 2_000]


# ---- what is said ----


def test_endoftext_in_a_text_without_a_separator_is_said_once(prepare):
    write({"a.txt": "one<|endoftext|>two\n" * 9, "b.txt": "<|endoftext|>\n" * 9, "c.csv": "text\na<|endoftext|>b\n"})
    out = prepare("a.txt", "b.txt", "c.csv")
    assert out.count("warning") == 1
    assert "a.txt holds <|endoftext|>" in out and "--separator='<|endoftext|>'" in out
    assert "warning" not in prepare("a.txt", "--separator=<|endoftext|>", "--overwrite=True", "--val_fraction=0")
    assert "warning" not in prepare("c.csv", "--overwrite=True", "--val_fraction=0")


def test_equal_documents_on_both_sides_are_counted(prepare):
    write({f"t/{i}.txt": f"document {i % 10}\n" * 100 for i in range(20)})
    out = prepare("t", "--val_fraction=0.2")
    copies = sum(text in documents("train") for text in documents("val"))
    assert copies > 0
    assert f"warning: the train split holds {copies} of {len(documents('val'))} documents of the val split too" in out
    write({f"u/{i}.txt": f"document {i}\n" * 100 for i in range(20)})
    assert "warning" not in prepare("u", "--val_fraction=0.2", "--overwrite=True")


def test_a_cut_document_with_a_copy_is_counted(prepare):
    write({f"c{i}.txt": "\ufeff" * (i % 2) + "one line\n" * 200 for i in range(6)})
    out = prepare(*(f"c{i}.txt" for i in range(6)))
    assert "the validation split is the last " in out
    assert "warning: the train split holds 1 of 1 document of the val split too" in out
    write({f"c{i}.txt": f"line of {i}\n" * 200 for i in range(6)})
    out = prepare(*(f"c{i}.txt" for i in range(6)), "--overwrite=True")
    assert "the validation split is the last " in out and "warning" not in out


@pytest.mark.parametrize(
    ("size", "config"),
    [
        (999_999, "text_small"),
        (1_000_000, "text_medium"),
        (19_999_999, "text_medium"),
        (20_000_000, "books"),
    ],
)
def test_the_config_fits_the_bytes(size, config, capsys):
    meta = {"tokenizer": "gpt2", "splits": {"train": {"bytes": size - 9}, "val": {"bytes": 9, "tokens": 2}}}
    command = prepare_text.next_command("my notes", meta)
    assert shlex.split(command) == [
        *("python", "train.py", f"config/{config}.py", "--dataset=my notes", "--out_dir=out/my notes")
    ]
    assert ("--tokenizer=bytes" in capsys.readouterr().out) == (size < 1_000_000)
    prepare_text.next_command("d", meta | {"tokenizer": "bytes"})
    assert capsys.readouterr().out == ""
    del meta["splits"]["val"]
    command = shlex.split(prepare_text.next_command("d", meta))
    s = settings.load(train.Settings, [str(ROOT / command[2]), *command[3:]])
    train.check(s)
    assert s.eval_interval == 0


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
        (["a.txt", ""], "one of the paths is empty"),
        (["a.txt", "nothing.txt"], "nothing.txt: there is no such file, folder or glob"),
        (["*.md"], "*.md: there is no such file, folder or glob"),
        (["empty.txt"], "these paths hold no text"),
        (["folder"], "these paths hold no text"),
        (["ends.txt", "--separator=<|end|>"], "nothing but separators"),
        (["a.jsonl", "--separator=<|end|>"], "does not part records, since each of them is a document; leave it out"),
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
    write({"a.jsonl": '{"text": "a<|end|>b"}'})
    Path("folder").mkdir()
    assert says in mistake(*args)
    assert data.names() == []
