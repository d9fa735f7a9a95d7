"""lib/files.py: whole or not at all, never over a file of another kind, and what a lock that can't be had says."""

import errno
import json
import os
import threading
from pathlib import Path

from lib import files

import pytest
from conftest import refusal
from filelock import FileLock, Timeout


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- reports ----


def test_a_report_replaces_an_older_one_whole():
    Path("a.json").write_text('{"results": [1]}')
    files.check_json("a.json")
    files.write_json("a.json", {"results": [2]})
    assert json.loads(Path("a.json").read_text()) == {"results": [2]} and os.listdir() == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 a checkpoint", b"text", b"[1]", b"{", b'{"tokenizer": "bytes"}', b"[" * 100_000, b"\xff\xfe{}"],
)
def test_a_file_of_another_kind_stays(content):
    Path("a.json").write_bytes(content)
    assert "something else than a report, and stays; --json=PATH" in refusal(files.check_json, "a.json")
    assert "--trace=PATH names another" in refusal(files.check_json, "a.json", "trace", holds="traceEvents")
    assert Path("a.json").read_bytes() == content


def test_a_link_to_a_file_of_another_kind_is_no_way_around():
    Path("best.pt").write_bytes(b"weights")
    Path("a.json").symlink_to("best.pt")
    assert "something else than a report" in refusal(files.check_json, "a.json")


def test_a_link_to_a_report_stays_a_link():
    Path("old.json").write_text('{"results": []}')
    Path("a.json").symlink_to("old.json")
    files.check_json("a.json")
    files.write_json("a.json", {"results": [3]})
    assert Path("a.json").is_symlink() and json.loads(Path("old.json").read_text()) == {"results": [3]}


@pytest.mark.parametrize("path", ["no/such/folder.json", "."])
def test_a_place_that_takes_no_report_is_one_line(path):
    assert "can't be written" in refusal(files.check_json, path)


def test_a_disk_that_fills_up_leaves_the_older_report(monkeypatch):
    Path("a.json").write_text('{"results": [1]}')

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert "a.json can't be written (No space left on device)" in refusal(files.write_json, "a.json", {"results": []})
    assert Path("a.json").read_text() == '{"results": [1]}' and os.listdir() == ["a.json"]


def test_a_full_disk_under_standard_output_is_one_line(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.print", full)
    assert "standard output can't be written (No space left on device)" in refusal(files.write_json, "-", {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_gets_the_report_and_stays_a_pipe():
    os.mkfifo("pipe")
    files.check_json("pipe")  # Opened and closed here, it would end for its reader.
    found = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()))
    reader.start()
    files.write_json("pipe", {"results": []})
    reader.join(10)
    assert json.loads(found[0]) == {"results": []} and Path("pipe").is_fifo()


# ---- temporary names ----


def test_a_temporary_name_that_is_taken_leads_nowhere():
    Path("book.txt").write_text("kept")
    Path("a.json.partial").symlink_to("book.txt")
    files.write_text(Path("a.json"), "new")
    assert Path("book.txt").read_text() == "kept" and Path("a.json").read_text() == "new"
    os.mkfifo("b.json.partial")  # Who opened it would wait for a reader.
    files.write_text(Path("b.json"), "new")
    assert Path("b.json").read_text() == "new" and not list(Path().glob("*.partial"))


# ---- locks ----


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(monkeypatch, capsys, number):
    def no_locks(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    files.lock("a.lock", timeout=0)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "a.lock can't be locked on this file system" in out and err == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM, errno.ESTALE])
def test_a_lock_that_fails_otherwise_names_its_file(monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="a.lock") as caught:
        files.lock("a.lock", timeout=0)
    assert (caught.value.errno, caught.value.filename) == (number, "a.lock")


def test_a_lock_that_another_holds_is_a_timeout():
    holder = FileLock("a.lock")
    with holder, pytest.raises((Timeout, RuntimeError)):
        files.lock("a.lock", timeout=0)
    files.lock("a.lock", timeout=0).release()


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"), (errno.EIO, "mend what is wrong there")],
)
def test_room_is_asked_for_only_where_it_helps(number, says):
    assert files.remedy(OSError(number, ""), "there") == says
