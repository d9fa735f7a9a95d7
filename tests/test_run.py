"""lib/run.py on a model of three numbers: what is on the disk after all that a loop tells, and after each fault."""

import errno
import fcntl
import json
import math
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import train
from lib import checkpoint, files, resume, runtime, sampling
from lib import run as run_py
from lib.run import Run
from model import GPTConfig

import pytest
import torch
from conftest import refusal, rows
from filelock import FileLock


class Three(torch.nn.Module):
    """A model of three numbers, which are the step that they are of."""

    config = GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=1)

    def __init__(self):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.zeros(3))

    def num_params(self):
        return 3


class Loop:
    """What train.py's loop does with a Run, without the training. `losses` are those of the evaluations to come."""

    def __init__(self, *losses, start=None, **more):
        self.s = train.Settings(**dict(out_dir="out/a", eval_interval=1, block_size=4) | more)
        self.rt, self.writer, self.losses = runtime.choose("cpu"), checkpoint.Writer(), list(losses)
        self.model, start = Three(), start or resume.Start()
        optimizer, scaler = torch.optim.AdamW(self.model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
        dataset = SimpleNamespace(name="tiny", tokenizer_spec="bytes", checksums={"train": "0" * 64})
        dataset.size = {"train": 5}.get
        self.run = Run(self.s, self.rt, self.writer, start, self.model, optimizer, scaler, dataset)
        self.state = start.state
        self.model.numbers.data.fill_(self.state.step)

    def boundary(self, kept_names=(), stopping=False):
        """Between two steps: evaluate, save, log."""
        self.run.collect()
        if "val_loss" not in self.state.row and self.losses and not stopping:
            self.run.evaluated(self.losses.pop(0))
        self.run.save_what_is_due(list(kept_names))
        self.run.log_row()

    def step(self, **row):
        self.state.step, self.state.sequence = self.state.step + 1, self.state.sequence + 2
        self.state.row = {"step": self.state.step, "loss": 1.0} | row
        self.model.numbers.data.fill_(self.state.step)

    def go(self, steps):
        """Boundary and step in turn, and the last boundary."""
        for _ in range(steps):
            self.boundary()
            self.state.row = {}
            self.step()
        self.boundary()
        return self

    def leave(self):
        self.run.lock.release()


def go_on(out="out/a"):
    """The Start of a command that goes on with a run."""
    path = Path(out, "ckpt.pt")
    ckpt = checkpoint.load(path)
    state = resume.State(**{name: ckpt[key] for name, key in resume.KEYS.items()})
    return resume.Start(path, ckpt, state, in_place=True, stamp=resume.stamp(path))


def on_disk(out="out/a"):
    """{name: the step whose weights a checkpoint has}."""
    found = {path.name: checkpoint.load(path) for path in Path(out).glob("*.pt")}
    for held in found.values():
        assert held["model"]["numbers"].tolist() == [held["iter_num"]] * 3
    return {name: held["iter_num"] for name, held in found.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def disk(monkeypatch):
    """disk.full: the names of checkpoints for which there is no room. disk.saved: [(name, step)] of those written."""

    class Disk:
        full, saved = set(), []

        def save(self, path, content, links=()):
            if path.name in self.full or "*" in self.full:
                time.sleep(0.01)  # The loop goes on meanwhile, where the file is written in the background.
                raise OSError(28, "No space left on device")
            save(path, content, links)
            self.saved.append((path.name, content["iter_num"]))

    save, disk = checkpoint.save, Disk()
    disk.full, disk.saved = set(), []
    monkeypatch.setattr(checkpoint, "save", disk.save)
    return disk


@pytest.fixture(params=["at once", "in the background"])
def background(request, monkeypatch):
    """Whether checkpoints are written while the loop goes on."""
    if request.param == "in the background":
        monkeypatch.setattr(checkpoint.Writer, "in_background", lambda writer, content: True)
    return request.param == "in the background"


# ---- what is saved ----


def test_the_first_checkpoint_is_written_before_the_first_step(disk):
    Loop(eval_interval=0).boundary()
    assert disk.saved == [("ckpt.pt", 0)]


def test_an_evaluation_saves_the_run_and_what_is_best_of_it(disk):
    Loop(5.0, 4.0, 4.5, 3.0).go(3)
    assert disk.saved == [
        ("ckpt.pt", 0),  # Random weights are nobody's best.
        ("ckpt.pt", 1),
        ("best.pt", 1),
        ("ckpt.pt", 2),
        ("ckpt.pt", 3),
        ("best.pt", 3),
    ]
    assert on_disk() == {"ckpt.pt": 3, "best.pt": 3}


def test_without_always_save_checkpoint_only_what_is_better_is_saved(disk):
    Loop(5.0, 4.0, 4.5, 3.0, always_save_checkpoint=False).go(3)
    assert disk.saved == [("ckpt.pt", 0), ("ckpt.pt", 1), ("best.pt", 1), ("ckpt.pt", 3), ("best.pt", 3)]


def test_weights_that_a_run_started_from_may_be_its_best(disk):
    loop = Loop(5.0, 6.0, 6.0, init_from="x.pt", always_save_checkpoint=False).go(2)
    loop.run.finish(interrupted=False)
    assert disk.saved == [("ckpt.pt", 0), ("best.pt", 0), ("ckpt.pt", 2), ("final.pt", 2)]


def test_a_kept_checkpoint_has_a_name_of_its_own_and_stays(disk):
    loop = Loop(eval_interval=0)
    loop.boundary()
    loop.step()
    loop.boundary(["ckpt_iter_1.pt", "ckpt_epoch_1.pt"])
    loop.step()
    loop.run.finish(interrupted=True)
    assert on_disk() == {"ckpt.pt": 2, "ckpt_iter_1.pt": 1, "ckpt_epoch_1.pt": 1}


def test_a_resumed_run_does_not_write_its_kept_checkpoint_again(disk):
    loop = Loop(eval_interval=0).go(1)
    loop.boundary(["ckpt_iter_1.pt"])
    loop.leave()
    disk.saved.clear()
    Loop(eval_interval=0, start=go_on(), learning_rate=1.0).boundary(["ckpt_iter_1.pt"])
    assert disk.saved == []


def test_the_end_saves_the_last_step_and_its_weights(background):
    loop = Loop(eval_interval=0).go(3)
    loop.run.finish(interrupted=False)
    assert on_disk() == {"ckpt.pt": 3, "final.pt": 3}


def test_an_interrupted_run_writes_no_final_weights(background):
    loop = Loop(eval_interval=0).go(3)
    loop.run.finish(interrupted=False)
    loop.leave()
    loop = Loop(eval_interval=0, start=go_on())
    loop.go(2)
    assert on_disk() == {"ckpt.pt": 3, "final.pt": 3}  # Nothing later is on the disk yet.
    loop.run.finish(interrupted=True)
    assert on_disk() == {"ckpt.pt": 5, "final.pt": 3}  # Only --overwrite=True removes anything.


def test_a_run_killed_between_its_checkpoint_and_its_best_writes_the_best(disk):
    disk.full = {"best.pt"}
    Loop(5.0, 4.0).go(1).leave()
    disk.full = set()
    held = checkpoint.load("out/a/ckpt.pt")  # as it was before the failure of best.pt was known
    torch.save(held | {"best_val_loss": 4.0}, "out/a/ckpt.pt")
    Loop(start=go_on()).boundary()
    assert on_disk() == {"ckpt.pt": 1, "best.pt": 1}


def test_the_other_processes_write_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runtime.Runtime, "gather", lambda rt, value: [value, value])
    loop = Loop(5.0, 4.0).go(1)
    loop.run.finish(interrupted=False)
    loop.run.close()
    assert not Path("out").exists() and loop.state.best_val_loss == 4.0


# ---- what can't be written ----


def test_a_first_checkpoint_that_the_disk_does_not_take_ends_the_run(disk):
    disk.full = {"ckpt.pt"}
    assert "make room there" in refusal(Loop(5.0).boundary)


@pytest.mark.parametrize("init_from", ["scratch", "gpt2"])  # Weights that a run starts from may be its best.
def test_nothing_is_written_before_there_is_a_checkpoint(disk, monkeypatch, background, init_from):
    """Else the same command would find the remains of a run that can't go on."""
    monkeypatch.setattr(sampling, "continuation", lambda *args: "a sample")
    disk.full = {"ckpt.pt"}
    loop = Loop(5.0, sample_tokens=9, init_from=init_from)
    assert "make room there" in refusal(loop.boundary)
    assert not resume.files_of_run("out/a")
    loop.leave()
    disk.full = set()
    loop = Loop(5.0, sample_tokens=9, init_from=init_from)
    loop.boundary()
    loop.run.collect(wait=True)
    best = ["best.pt"] if init_from == "gpt2" else []
    assert sorted(os.listdir("out/a")) == [".lock", *best, "ckpt.pt", "metrics.jsonl", "run.json", "samples.txt"]


def test_a_kill_right_after_the_first_row_leaves_a_run_that_goes_on(monkeypatch):
    """The first checkpoint is written in the background. The row waits for it."""
    save, found = checkpoint.save, []

    def slow_save(*args):
        time.sleep(0.2)
        found.append(Path("out/a/metrics.jsonl").exists())
        save(*args)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda writer, content: True)
    Loop(5.0).boundary()
    assert found == [False] and rows("out/a") and on_disk() == {"ckpt.pt": 0}


def test_a_checkpoint_that_could_not_be_written_is_tried_again_after_a_minute(disk, monkeypatch, capsys, background):
    now = [1000.0]
    monkeypatch.setattr(run_py.time, "monotonic", lambda: now[0])
    loop = Loop(5.0, 4.0, eval_interval=0).go(0)
    disk.full = {"ckpt.pt"}
    loop.go(1)
    loop.run.collect(wait=True)
    assert (
        "out/a/ckpt.pt could not be written (No space left on device); the older one stands" in capsys.readouterr().out
    )
    disk.full = set()
    for seconds, step in ((59, 0), (2, 2)):
        now[0] += seconds
        loop.go(1)
        loop.run.collect(wait=True)
        assert on_disk()["ckpt.pt"] == step


def test_an_end_that_can_t_be_saved_says_so_and_the_older_checkpoint_stands(disk):
    loop = Loop(eval_interval=0).go(2)
    disk.full = {"*"}
    assert "the last steps are not saved: make room in out/a" in refusal(loop.run.finish, interrupted=False)
    assert on_disk() == {"ckpt.pt": 0}
    disk.full = {"final.pt"}
    Path("out/a/final.pt").write_bytes(b"of an earlier step")
    assert "final.pt is not written: make room" in refusal(loop.run.finish, interrupted=False)
    Path("out/a/final.pt").unlink(missing_ok=True)
    assert on_disk() == {"ckpt.pt": 2}


@pytest.mark.parametrize(("losses", "best"), [([5, 3, 4, 4.5], 2), ([5, 3, 2.5, 4], 2), ([5, 3, 6, 5.5], 3)])
def test_best_weights_that_could_not_be_written_leave_their_place_to_the_next(disk, losses, best, background):
    loop = Loop(*map(float, losses))
    loop.go(0)
    for step in range(1, 4):
        disk.full = {"best.pt"} if step == 1 else set()
        loop.step()
        loop.boundary()
        loop.run.collect(wait=True)
    assert on_disk()["best.pt"] == best
    loop.run.finish(interrupted=True)
    assert checkpoint.load("out/a/ckpt.pt")["best_val_loss"] == losses[best]


def test_a_failure_that_is_known_late_changes_the_best_from_then_on(disk, monkeypatch):
    """best.pt of step 1 fails while step 2 is evaluated, where 4.0 is no better than 3.0 yet. At step 3 it is known."""
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda writer, content: True)
    release, save = threading.Event(), checkpoint.save

    def blocked(path, content, links=()):
        if path.name == "best.pt" and content["iter_num"] == 1:
            release.wait(10)
            raise OSError(28, "No space left on device")
        save(path, content, links)

    monkeypatch.setattr(checkpoint, "save", blocked)
    loop = Loop(5.0, 3.0, 4.0, 4.5)
    loop.go(1)
    loop.step()
    loop.run.collect()
    loop.run.evaluated(loop.losses.pop(0))
    assert (loop.state.best_val_loss, loop.state.worse) == (3.0, 1)
    release.set()
    loop.run.collect(wait=True)
    assert loop.state.best_val_loss == math.inf  # There is no best.pt: random weights are not worth a file.
    loop.step()
    loop.boundary()
    loop.run.collect(wait=True)
    assert on_disk()["best.pt"] == 3


def test_all_processes_agree_on_a_best_that_the_first_could_not_write(disk, monkeypatch):
    """Else they would disagree on when patience is at an end, and wait for each other."""
    first = Loop(5.0, 4.0, 4.5, 4.6, patience=1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = Loop(5.0, 4.0, 4.5, 4.6, patience=1)
    told = []
    monkeypatch.setattr(first.rt, "gather", lambda value: told.append(value) or [value], raising=False)
    monkeypatch.setattr(second.rt, "gather", lambda value: [told.pop(), value], raising=False)
    disk.full = {"best.pt"}
    for step in range(4):
        disk.full = {"best.pt"} if step == 1 else set()
        for loop in (first, second):
            loop.boundary()
        assert (first.state.worse, first.run.ended(9)) == (second.state.worse, second.run.ended(9))
        first.step(), second.step()
    assert first.state.best_val_loss == second.state.best_val_loss == 4.5 and on_disk()["best.pt"] == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_validation_loss_that_is_not_finite_replaces_nothing(loss, background):
    loop = Loop(5.0, 4.0, loss).go(1)
    loop.step()
    assert "diverged at step 2: the validation loss is" in refusal(loop.boundary)
    assert on_disk() == {"ckpt.pt": 1, "best.pt": 1}


@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_whose_loss_is_not_finite_replace_nothing(interrupted):
    loop = Loop(eval_interval=0).go(2)
    loop.boundary(["ckpt_iter_2.pt"])
    for step in (3, 4):
        assert not loop.run.takes_step(math.nan, 1.0)
        loop.step(loss=math.nan)
        loop.boundary([f"ckpt_iter_{step}.pt"])
    assert loop.state.skipped == 2
    assert "diverged at step 4: the loss is nan; the last" in refusal(loop.run.finish, interrupted=interrupted)
    assert on_disk() == {"ckpt.pt": 2, "ckpt_iter_2.pt": 2}
    assert loop.run.takes_step(3.0, 1.0)
    loop.boundary(["ckpt_iter_4.pt"])
    assert on_disk() == {"ckpt.pt": 4, "ckpt_iter_2.pt": 2, "ckpt_iter_4.pt": 4}


def test_steps_that_are_not_finite_end_a_run_unless_a_loss_scale_is_looked_for():
    loop = Loop(eval_interval=0)
    for loss, norm in [(3.0, math.inf), (math.nan, 1.0)] * 2:
        assert not loop.run.takes_step(loss, norm)
    assert loop.run.takes_step(3.0, 1.0)  # The count begins anew.
    for _ in range(4):
        assert not loop.run.takes_step(math.inf, 1.0)
    assert "5 steps in a row were not finite; start with a lower" in refusal(loop.run.takes_step, math.inf, 1.0)
    loop.run.skipped_in_a_row, loop.run.scaler = 0, torch.amp.GradScaler("cpu", init_scale=2.0)
    loop.run.scaler.scale(torch.zeros(()))  # It has a scale from its first use on.
    assert not any(loop.run.takes_step(3.0, math.inf) for _ in range(9))


@pytest.mark.parametrize(
    "row", ['{"step": 1, "tokens_per_sec": 5}', '{"step": 1, "tokens": "x"}', "[1]", '{"tokens": 3}']
)
def test_a_row_that_is_none_costs_no_final_weights(row):
    loop = Loop(4.0).go(2)
    with open("out/a/metrics.jsonl", "a") as file:
        file.write(row + "\n")
    loop.run.finish(interrupted=False)
    assert on_disk()["final.pt"] == 2 and json.loads(Path("out/a/run.json").read_text())["best_val_loss"] == 4.0


def test_a_command_without_evaluations_keeps_what_the_best_loss_was_measured_on():
    Loop(4.0).go(1).leave()
    held = checkpoint.load("out/a/ckpt.pt")
    torch.save(held | {"val_sha256": "1" * 64}, "out/a/ckpt.pt")
    loop = Loop(start=go_on(), eval_interval=0).go(1)
    loop.run.finish(interrupted=True)
    assert checkpoint.load("out/a/ckpt.pt")["val_sha256"] == "1" * 64


def test_a_checkpoint_that_is_kept_has_the_evaluation_that_a_signal_put_off():
    loop = Loop(eval_interval=0).go(1)
    loop.boundary(["ckpt_iter_1.pt"], stopping=True)
    loop.run.finish(interrupted=True)
    loop.leave()
    Loop(4.0, start=go_on()).boundary(["ckpt_iter_1.pt"])
    assert checkpoint.load("out/a/ckpt_iter_1.pt")["best_val_loss"] == 4.0


def test_an_evaluation_that_is_as_good_as_the_best_writes_no_checkpoint():
    loop = Loop(5.0, 4.0, 4.0, always_save_checkpoint=False).go(2)
    assert on_disk() == {"ckpt.pt": 1, "best.pt": 1} and loop.state.worse == 1


def test_weights_that_are_not_finite_replace_nothing():
    loop = Loop(5.0, 4.0, 3.0).go(1)
    loop.step()
    loop.model.numbers.data[1] = math.nan
    says = refusal(loop.boundary)
    assert "the weights are not finite; the last checkpoint stands in out/a: go on from it, or from one" in says
    assert on_disk() == {"ckpt.pt": 1, "best.pt": 1}


# ---- the folder ----


def test_one_process_trains_in_a_folder_at_a_time():
    Path("out/a").mkdir(parents=True)
    with FileLock("out/a/.lock"):
        assert "another process trains in out/a" in refusal(Loop)


def test_another_process_that_has_saved_meanwhile_is_not_undone():
    Loop(eval_interval=0).go(1).leave()
    start = go_on()
    later = Loop(eval_interval=0, start=go_on()).go(2)
    later.run.finish(interrupted=True)
    later.leave()
    assert "another process has just saved out/a/ckpt.pt" in refusal(Loop, start=start)
    assert on_disk() == {"ckpt.pt": later.state.step}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_trained_on(monkeypatch, capsys, number):
    def no_locks(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    Loop(5.0, 4.0).go(1)
    assert "out/a/.lock can't be locked on this file system" in capsys.readouterr().out
    assert on_disk() == {"ckpt.pt": 1, "best.pt": 1}


def test_an_out_dir_on_a_disk_that_is_not_there_is_one_line():
    Path("out").mkdir()
    Path("out/a").symlink_to("/nowhere/runs")
    assert "out_dir=out/a is a link to /nowhere/runs, which is not there" in refusal(Loop)


def test_a_metrics_file_that_is_none_is_one_line():
    Loop(eval_interval=0).go(1).leave()
    Path("out/a/metrics.jsonl").unlink(missing_ok=True)
    os.mkfifo("out/a/metrics.jsonl")  # A program that opened it would wait for ever.
    assert "out/a/metrics.jsonl is no file" in refusal(Loop, start=go_on())


def test_a_disk_that_is_full_at_a_resume(monkeypatch):
    """The rows are written anew only where some are dropped."""

    def full(path, text):
        raise OSError(28, "No space left on device")

    Loop(5.0, 4.0).go(1).leave()
    path = Path("out/a/metrics.jsonl")
    both = path.read_text()
    path.write_text(both.splitlines(keepends=True)[0])
    monkeypatch.setattr(files, "write_text", full)
    Loop(start=go_on()).leave()
    path.write_text(both)  # The row of step 1 is to be dropped, since it will be logged again.
    assert "make room in out/a" in refusal(Loop, start=go_on())


@pytest.mark.parametrize("name", ["afile", "afile/sub", "out/" + "x" * 300])
def test_an_out_dir_that_can_t_be_is_one_line(name):
    Path("afile").write_text("")
    assert "can't be written" in refusal(Loop, out_dir=name)


def test_a_folder_that_is_gone_when_a_write_begins_is_said_as_such(monkeypatch):
    loop = Loop(eval_interval=0).go(1)

    def fail_since_it_is_gone(path, content, links=()):
        os.rename("out/a", "out/b")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(checkpoint, "save", fail_since_it_is_gone)
    assert "out/a is no longer the folder that this run has locked" in refusal(loop.run.finish, interrupted=True)


def test_a_lock_file_that_somebody_removed_is_made_again():
    loop = Loop(eval_interval=0).go(1)
    Path("out/a/.lock").unlink()
    loop.go(1)
    assert "another process trains in out/a" in refusal(Loop, start=go_on())
    Path("out/a/.lock").unlink()
    with open("out/a/.lock", "w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        loop.step()
        assert "another process trains in out/a" in refusal(loop.run.finish, interrupted=True)


def test_files_on_a_larger_disk_stay_there():
    Path("disk").mkdir()
    Path("out/a").mkdir(parents=True)
    Path("out/a/best.pt").symlink_to("../../disk/best.pt")
    loop = Loop(5.0, 4.0, overwrite=False)
    loop.go(1)
    assert Path("out/a/best.pt").is_symlink() and on_disk("disk") == {"best.pt": 1}


@pytest.mark.parametrize("kept", ["out/a/ckpt_iter_2.pt", "out/b/ckpt.pt", "disk/ckpt_iter_2.pt"])
def test_a_link_to_a_file_of_a_run_is_replaced_and_the_file_stays(kept):
    """Somebody who goes back in place, or begins from another run, may link instead of copying."""
    loop = Loop(eval_interval=0, out_dir=str(Path(kept).parent)).go(2)
    loop.boundary(["ckpt_iter_2.pt"])
    loop.run.finish(interrupted=True)
    loop.leave()
    Path("disk/.lock").unlink(missing_ok=True)  # This one is a folder where somebody keeps files, and no run's.
    before = Path(kept).read_bytes()
    Path("out/a").mkdir(parents=True, exist_ok=True)
    Path("out/a/ckpt.pt").unlink(missing_ok=True)
    Path("out/a/ckpt.pt").symlink_to(Path(kept).absolute())
    loop = Loop(eval_interval=0, start=go_on()).go(1)
    loop.run.finish(interrupted=True)
    assert Path(kept).read_bytes() == before and not Path("out/a/ckpt.pt").is_symlink()
    assert on_disk()["ckpt.pt"] == 3


def test_a_folder_in_the_place_of_final_weights_is_one_line():
    loop = Loop(eval_interval=0).go(1)
    Path("out/a/final.pt").mkdir()
    assert "final.pt is not written: mend what is wrong in out/a" in refusal(loop.run.finish, interrupted=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_room_is_asked_for_only_where_it_helps(monkeypatch, number):
    loop = Loop(eval_interval=0).go(1)

    def fail(path, content, links=()):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save", fail)
    assert ("make room" in refusal(loop.run.finish, interrupted=True)) == (number == errno.ENOSPC)


def test_a_temporary_name_that_is_a_link_leads_nowhere():
    Path("book.txt").write_text("kept")
    Path("out/a").mkdir(parents=True)
    loop = Loop(eval_interval=0)
    for name in ("ckpt.pt", "run.json", "ckpt_iter_1.pt"):
        Path("out/a", f"{name}.partial").symlink_to("../../book.txt")
    loop.boundary(["ckpt_iter_1.pt"])
    assert Path("book.txt").read_text() == "kept" and on_disk() == {"ckpt.pt": 0, "ckpt_iter_1.pt": 0}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_metrics_file_that_becomes_a_pipe_without_a_reader_ends_no_run(capsys):
    loop = Loop(eval_interval=0).go(1)
    Path("out/a/metrics.jsonl").unlink()
    os.mkfifo("out/a/metrics.jsonl")
    loop.go(1)
    assert "metrics.jsonl could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("fate", ["removed", "renamed", "replaced"])
@pytest.mark.parametrize("moment", ["a save", "a row"])
def test_a_folder_that_is_not_the_one_that_was_locked_gets_nothing(fate, moment):
    loop = Loop(eval_interval=0).go(1)
    if fate == "removed":
        shutil.rmtree("out/a")
    else:
        os.rename("out/a", "out/b")
    if fate == "replaced":
        other = Loop(eval_interval=0).go(1)
        before = {path.name: path.read_bytes() for path in Path("out/a").iterdir()}
    loop.step()
    act = loop.run.log_row if moment == "a row" else lambda: loop.run.finish(interrupted=True)
    says = refusal(act)
    assert "out/a is no longer the folder that this run has locked" in says and "of step 0" in says
    if fate == "replaced":
        assert {path.name: path.read_bytes() for path in Path("out/a").iterdir()} == before
        other.leave()
    else:
        assert not Path("out/a").exists()


def test_what_a_killed_write_has_left_is_removed_and_other_files_stay():
    Path("out/a").mkdir(parents=True)
    for name in ("ckpt.pt.partial", "ckpt_iter_5.pt.partial", "mine.txt", "mine.pt"):
        Path("out/a", name).write_text("x")
    Loop(eval_interval=0, overwrite=True)
    assert sorted(os.listdir("out/a")) == [".lock", "mine.pt", "mine.txt"]


def test_overwrite_removes_what_a_run_has_left_and_nothing_else():
    Path("out/a").mkdir(parents=True)
    left = ["ckpt.pt", "best.pt", "final.pt", "ckpt_iter_5.pt", "ckpt_epoch_1.pt", "eval_test.json", "metrics.jsonl"]
    for name in [*left, "mine.pt", "run.log"]:
        Path("out/a", name).write_text("x")
    Path("elsewhere").write_text("kept")
    Path("out/a/ckpt_iter_6.pt").symlink_to("../../elsewhere")
    Loop(eval_interval=0, overwrite=True, start=resume.Start(stamp=resume.stamp(Path("out/a/ckpt.pt"))))
    assert sorted(os.listdir("out/a")) == [".lock", "mine.pt", "run.log"] and Path("elsewhere").read_text() == "kept"


def test_overwrite_removes_nothing_where_it_can_t_remove_all():
    Path("out/a/ckpt_iter_9.pt").mkdir(parents=True)
    Path("out/a/ckpt.pt").write_text("x")
    start = resume.Start(stamp=resume.stamp(Path("out/a/ckpt.pt")))
    assert "ckpt_iter_9.pt is a folder" in refusal(Loop, eval_interval=0, overwrite=True, start=start)
    assert Path("out/a/ckpt.pt").read_text() == "x"


# ---- metrics.jsonl ----


def test_a_resume_completes_the_row_of_its_step():
    loop = Loop(5.0, 4.0).go(1)
    loop.step()
    loop.boundary(stopping=True)  # The evaluation of step 2 is put off.
    assert [(row["step"], row.get("val_loss")) for row in rows("out/a")] == [(0, 5.0), (1, 4.0), (2, None)]
    loop.run.finish(interrupted=True)
    loop.leave()
    Loop(3.0, start=go_on()).boundary()
    assert [(row["step"], row.get("val_loss")) for row in rows("out/a")] == [(0, 5.0), (1, 4.0), (2, 3.0)]
    assert rows("out/a")[2]["loss"] == 1.0


def test_rows_beyond_the_checkpoint_and_what_is_no_row_are_dropped():
    Path("out/a").mkdir(parents=True)
    lines = [
        '{"step": 0}',
        '{"step": 1, "loss": 2.0}',
        "[" * 100_000,
        "{}",
        "7",
        '{"step": "x"}',
        '{"step": 2}',
        '{"st',
    ]
    Path("out/a/metrics.jsonl").write_text("\n".join(lines))
    run_py.keep_rows_before(Path("out/a/metrics.jsonl"), 2)
    assert Path("out/a/metrics.jsonl").read_text().splitlines() == lines[:2]


def test_figures_that_are_not_finite_are_null():
    loop = Loop(eval_interval=0)
    loop.step(loss=math.nan, grad_norm=math.inf, mfu=None)
    loop.boundary()
    (row,) = Path("out/a/metrics.jsonl").read_text().splitlines()
    row = json.loads(row, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "grad_norm": None, "mfu": None}


def test_a_row_that_can_t_be_written_ends_no_run(monkeypatch, capsys):
    loop = Loop(eval_interval=0).go(0)

    def full(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "append_line", full)
    loop.go(1)
    assert "metrics.jsonl could not be written (No space left on device); training goes on" in capsys.readouterr().out


def test_a_row_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows"
    files.append_line(path, "one")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))
    try:
        with pytest.raises(OSError, match="No space|too large"):
            files.append_line(path, "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    files.append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


# ---- the end by patience ----


def test_a_run_ends_by_its_length_or_by_its_patience():
    loop = Loop(5.0, 4.0, 4.5, 4.0, 3.0, patience=2)
    assert not loop.run.ended(max_iters=9)
    ends = []
    for _ in range(5):
        loop.boundary()
        ends.append(loop.run.ended(max_iters=9))
        loop.step()
    assert ends == [False, False, False, True, False]  # An equal loss is no better one.
    assert loop.run.ended(max_iters=5)


def test_patience_counts_on_across_a_stop():
    loop = Loop(4.0, 4.5, patience=2).go(1)
    loop.run.finish(interrupted=True)
    loop.leave()
    again = Loop(4.6, start=go_on(), patience=2)
    again.step()
    again.boundary()
    assert again.state.worse == 2 and again.run.ended(max_iters=9)
