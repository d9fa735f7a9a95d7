"""prepare_stdlib.py on a small library that the tests write."""

import sysconfig
from pathlib import Path

from lib import data, tokenizer

import conftest
import pytest

LEFT_OUT = ["test/a.py", "json/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py", "dist-packages/e/f.py"]


@pytest.fixture
def run(script):
    return lambda *args: script("prepare_stdlib", *args)


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """A library of 45 modules in the order of their names, under a path that itself has a folder `tests`."""
    root = tmp_path / "tests" / "lib"
    modules = {f"{'json/' if i % 2 else ''}m{i:02}.py": f"# module {i}: ünï\nx = {i}\n" for i in range(45)}
    others = {"empty.py": "", "notes.txt": "no module\n", "__pycache__/m.py": "cached = 1\n"}
    for name, text in {**modules, **others, **dict.fromkeys(LEFT_OUT, "left_out = 1\n")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return [modules[name] for name in sorted(modules, key=lambda name: Path(name).parts)]


def documents(split):
    return conftest.documents("stdlib", split, tokenizer.BytesTokenizer())


def test_the_modules_are_shared_out_without_tests_and_installed_packages(run, library):
    status, out, _ = run()
    assert status == 0
    assert documents("val") == library[::20]
    assert documents("train") == [text for i, text in enumerate(library) if i % 20]
    assert "45 documents" not in out
    assert "data/stdlib: tokenizer bytes, 257 ids" in out
    assert "42 documents" in out


def test_val_every_sets_the_share(run, library):
    assert run("--val_every=9")[0] == 0
    assert documents("val") == library[::9]
    assert data.Dataset("stdlib").splits["val"]["bytes"] == len("".join(library[::9]).encode())


def test_a_second_run_says_so_and_changes_nothing(run):
    assert run()[0] == 0
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino, p.read_bytes()) for p in Path("data/stdlib").iterdir()}
    status, out, _ = run("--val_every=3")
    assert status == 0
    assert out == "data/stdlib exists already; remove the folder to prepare it again\n"
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino, p.read_bytes()) for p in Path("data/stdlib").iterdir()} == before


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("--val_every=23", "this Python has 45 modules"),
        ("--val_every=1", "val_every=1 leaves nothing to train on"),
        ("--seed=1", "unknown setting"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_dataset(run, arg, says):
    status, out, err = run(arg)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert data.names() == []


def test_a_module_that_is_not_utf8_is_named_and_leaves_no_dataset(run):
    bad = Path(sysconfig.get_paths()["stdlib"], "m20.py")
    bad.write_bytes(b"x = 'caf\xe9'\n")
    status, _, err = run()
    assert status == 2
    assert f"{bad}: byte 8 is not UTF-8" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert data.names() == []
