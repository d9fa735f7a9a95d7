"""prepare_stdlib.py on a small library of this test's own making."""

import runpy
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import data
import prepare_stdlib

ROOT = Path(prepare_stdlib.__file__).parent
LEFT_OUT = ["test/a.py", "json/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py", "dist-packages/e/f.py"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--key=value", ...) runs the script as it stands: (exit status, standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare_stdlib.py", *args])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / "prepare_stdlib.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


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
    """The texts that the end-of-texts of a split precede."""
    ids, tok = data.Dataset("stdlib").tokens(split), data.BytesTokenizer()
    assert ids[0] == tok.eot
    return [tok.decode(part.tolist()).decode() for part in np.split(ids, np.flatnonzero(ids == tok.eot)[1:])]


def test_the_modules_are_shared_out_without_tests_and_installed_packages(run, library):
    status, out, _ = run()
    assert status == 0
    assert documents("val") == library[::20]
    assert documents("train") == [text for i, text in enumerate(library) if i % 20]
    assert "45" not in out
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
    assert out == "data/stdlib is there already; remove the folder to prepare it again\n"
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
