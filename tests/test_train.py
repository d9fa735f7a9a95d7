"""train.py: the loop against slow exact versions of itself, resumes to the bit, and what it refuses."""

import contextlib
import gc
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import weakref
from pathlib import Path

import train as train_py
from lib import checkpoint, data, prepare, processes, resume, tokenizer
from lib.settings import UserError
from model import GPT, GPTConfig

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    call_script,
    rows,
    same_bits,
    same_final_weights,
    weights,
    without_speed,
    write_corpus,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of the fixture `train` with no other setting. Nothing may change it."""
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        write_corpus("tiny", tokenizer.BytesTokenizer())
        assert call_script("train", *TINY, "--out_dir=out/a") == 0
        return Path("out/a").absolute()


@pytest.fixture
def finished(corpus, trained):
    """out/a is a finished run, as train("--out_dir=out/a") makes it."""
    shutil.copytree(trained, "out/a")


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def at_each_forward(monkeypatch, look):
    """A list that gets look(model) at each forward pass of a training."""
    forward, seen = GPT.forward, []

    def watched(model, *args):
        seen.append(look(model))
        return forward(model, *args)

    monkeypatch.setattr(GPT, "forward", watched)
    return seen


def test_a_step_is_adamw_on_the_mean_gradient_of_the_global_batch(train):
    """One process of the loop against the same steps done at once: plain cross-entropy, AdamW written out by hand."""
    assert train("--out_dir=out/a", "--n_layer=2", "--dropout=0", "--max_iters=3", "--eval_interval=0")[0] == 0
    s = train_py.Settings(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, beta2=0.95)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16))
    tokens = data.Dataset("tiny").tokens("train")
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    logged = []
    for step in range(3):
        x, y = map(torch.from_numpy, data.batch(tokens, 16, 1337, step * 8, 8))
        loss = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        lr = train_py.learning_rate_at(step, s, max_iters=3)
        logged.append((loss.item(), norm, lr))
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = moments[name]
                grad = p.grad * min(1.0, 1.0 / norm)
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.95).add_(0.05 * grad**2)
                p.mul_(1 - lr * (0.1 if p.dim() == 2 else 0))
                p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    for (loss, norm, lr), row in zip(logged, rows("out/a"), strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["lr"] == pytest.approx(lr)
    trained = weights("out/a/final.pt")
    for name, p in model.named_parameters():
        # Adam's first steps have about the size of the rate wherever a gradient is near zero, whatever its sign.
        assert (trained[name] - p).abs().mean() < 2e-5, name


def test_micro_batches_do_not_change_the_training(train):
    args = "--dropout=0", "--max_iters=6"
    train("--out_dir=out/a", *args)
    for steps, size in ((1, 8), (4, 2), (8, 1)):
        out = f"out/{steps}x{size}"
        train(f"--out_dir={out}", *args, f"--batch_size={size}", f"--gradient_accumulation_steps={steps}")
        for a, b in zip(rows("out/a"), rows(out), strict=True):
            assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4), out
            assert a["epoch"] == b["epoch"] if "epoch" in a else a["step"] == 0


def test_dropout_changes_a_step_by_a_seed_of_each_micro_batch(train, monkeypatch):
    seeds = at_each_forward(monkeypatch, lambda model: torch.initial_seed())
    for out, dropout in (("out/a", 0.2), ("out/b", 0.0)):
        train(f"--out_dir={out}", f"--dropout={dropout}", "--max_iters=3", "--eval_interval=0")
        assert checkpoint.load(f"{out}/final.pt")["model_args"]["dropout"] == dropout
    assert seeds == [data.seed_of(1337, step, micro) for step in range(3) for micro in range(2)] * 2
    assert rows("out/a")[0]["loss"] != rows("out/b")[0]["loss"]


def test_grad_clip_0_clips_nothing(train):
    for out, clip in (("out/a", 0), ("out/b", 1e9)):
        train(f"--out_dir={out}", f"--grad_clip={clip}", "--max_iters=3", "--eval_interval=0")
    assert same_final_weights("out/a", "out/b")


def test_kept_names_are_of_every_save_interval_and_of_the_epochs_that_a_step_completes():
    def names(step, **settings):
        return train_py.kept_names(train_py.Settings(**settings), resume.State(step, sequence=step * size), size, 10)

    size = 4  # An epoch ends in steps 3, 5, 8, 10, ...
    assert [step for step in range(8) if names(step, save_interval=3)] == [3, 6]
    assert names(3, save_interval=3, save_epochs=1) == ["ckpt_iter_3.pt", "ckpt_epoch_1.pt"]
    assert {step: names(step, save_epochs=2) for step in range(11) if names(step, save_epochs=2)} == {
        5: ["ckpt_epoch_2.pt"],
        10: ["ckpt_epoch_4.pt"],
    }
    size = 25  # Two or three epochs end in each step.
    assert [names(step, save_epochs=3) for step in range(4)] == [[], [], ["ckpt_epoch_5.pt"], ["ckpt_epoch_7.pt"]]


def test_the_schedule():
    s = train_py.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=0)
    rates = [train_py.learning_rate_at(i, s, max_iters=110) for i in range(130)]
    assert rates[:11] == pytest.approx([(i + 1) / 11 for i in range(11)]) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[60] == pytest.approx(0.55)  # half-way down
    assert rates[110:] == [0.1] * 20
    s.lr_decay_iters = 60
    assert train_py.learning_rate_at(60, s, max_iters=110) == 0.1
    s.decay_lr = False
    assert {train_py.learning_rate_at(i, s, 110) for i in range(10, 120)} == {1.0}


def test_the_other_schedules():
    def rates(schedule, **settings):
        s = train_py.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_schedule=schedule, **settings)
        return [train_py.learning_rate_at(i, s, max_iters=110) for i in range(130)]

    assert set(rates("constant")[10:]) == {1.0}
    linear, wsd = rates("linear"), rates("wsd", cooldown_frac=0.5)
    assert linear[:11] == wsd[:11] == rates("cosine")[:11]
    assert linear[110:] == wsd[110:] == [0.1] * 20
    assert [a - b for a, b in zip(linear[10:110], linear[11:111], strict=True)] == pytest.approx([0.009] * 100)
    assert wsd[10:56] == [1.0] * 46  # flat to half of the steps
    assert [a - b for a, b in zip(wsd[55:110], wsd[56:111], strict=True)] == pytest.approx([0.9 / 55] * 55)
    for schedule in ("linear", "wsd"):
        assert set(rates(schedule, decay_lr=False)) == {1.0}  # as in nanoGPT, without a warm-up
    assert rates("wsd", cooldown_frac=0.0)[109:] == [1.0] + [0.1] * 20
    assert rates("wsd", cooldown_frac=0.99) == pytest.approx(linear)  # it begins within the warm-up


def test_patience_ends_a_run_that_gets_no_better(train, monkeypatch):
    """It ends as a run does, says so when asked again, and goes on when there is to be more patience."""
    losses = iter([5.0, 4.0, 4.5, 4.4, 4.3, 4.2])
    monkeypatch.setattr(train_py, "evaluate", lambda *args: next(losses))
    args = "--out_dir=out/a", "--eval_interval=2", "--max_iters=100"
    status, out, _ = train(*args, "--patience=2")
    assert status == 0 and "no better validation loss than 4.0000 in 2 evaluations" in out
    assert checkpoint.load("out/a/final.pt")["iter_num"] == 6 and checkpoint.load("out/a/best.pt")["iter_num"] == 2
    status, out, _ = train(*args, "--patience=2")
    assert status == 0 and "has finished at step 6; raise patience" in out
    status, out, _ = train(*args, "--patience=4")
    assert status == 0 and "no better validation loss than 4.0000 in 4 evaluations" in out
    assert checkpoint.load("out/a/final.pt")["iter_num"] == 10
    assert [r["step"] for r in rows("out/a")] == list(range(11))


def test_patience_counts_on_across_a_stop(train, monkeypatch):
    losses = iter([4.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(train_py, "evaluate", lambda *args: next(losses))
    args = "--out_dir=out/a", "--eval_interval=2", "--patience=2"
    train(*args, "--max_iters=2")
    status, out, _ = train(*args, "--max_iters=100")
    assert status == 0 and checkpoint.load("out/a/final.pt")["iter_num"] == 4


def test_the_loss_falls_and_every_step_is_logged(train):
    status, out, _ = train("--out_dir=out/a", "--max_iters=40", "--eval_interval=20", "--dropout=0")
    found = rows("out/a")
    assert status == 0 and [r["step"] for r in found] == list(range(41))
    assert [r["step"] for r in found if "val_loss" in r] == [0, 20, 40]
    assert found[0]["val_loss"] == pytest.approx(math.log(257), abs=0.2)
    assert found[40]["val_loss"] < found[20]["val_loss"] < found[0]["val_loss"] - 1
    assert all(r["tokens"] == r["step"] * 4 * 2 * 16 for r in found)
    assert sum(line.startswith("step") and "tokens/s" in line for line in out.splitlines()) == 40


def test_the_last_step_is_logged_and_evaluated_whatever_the_intervals(train, monkeypatch):
    lap = train_py.Clock.lap
    monkeypatch.setattr(train_py.Clock, "lap", lambda clock: lap(clock) and 0.5)
    train("--out_dir=out/a", "--max_iters=3", "--log_interval=2", "--eval_interval=2")
    found = rows("out/a")
    assert [row["step"] for row in found] == [0, 2, 3] and all("val_loss" in row for row in found)
    assert [row["tokens_per_sec"] for row in found[1:]] == [4 * 2 * 16 / 0.5] * 2  # A step takes half a second.


def test_the_validation_loss_is_the_stream_protocol_s(train, finished, script):
    script("eval", "--out_dir=out/a", "--split=val")
    report = json.loads(Path("out/a/eval_val.json").read_text())
    best = min(r["val_loss"] for r in rows("out/a") if "val_loss" in r)
    assert math.log(report["results"][0]["token_ppl"]) == pytest.approx(best, abs=1e-5)


def test_eval_iters_scores_the_windows_of_so_many_steps_however_a_step_is_split(train, monkeypatch):
    seen, window_batch = [], data.window_batch

    def watched(ids, windows, width):
        seen.extend(windows)
        return window_batch(ids, windows, width)

    monkeypatch.setattr(data, "window_batch", watched)
    for split in ("--batch_size=8 --gradient_accumulation_steps=1", "--batch_size=2 --gradient_accumulation_steps=4"):
        train("--out_dir=out/" + split[-1], "--eval_iters=3", "--eval_interval=6", *split.split())
    evaluations = [seen[i : i + 24] for i in range(0, len(seen), 24)]  # 3 steps of 8 sequences
    assert len(evaluations) == 6 and all(windows == evaluations[0] for windows in evaluations)
    last = data.stream_windows(len(data.Dataset("tiny").validation_ids()), 16)[-1]
    assert len(set(evaluations[0])) == 24 and last[0] / 2 < evaluations[0][-1][0] < last[0]  # spread over the split


def test_the_norm_of_the_weights_is_that_before_the_step(train):
    train("--out_dir=out/a", "--save_interval=1", "--eval_interval=0")
    for row in rows("out/a")[1:]:
        before = checkpoint.load(f"out/a/ckpt_iter_{row['step'] - 1}.pt")["model"]
        del before["lm_head.weight"]  # It is wte.weight.
        assert row["weight_norm"] == pytest.approx(torch.cat([p.flatten() for p in before.values()]).norm().item())


def test_run_json_says_what_a_run_was(train):
    train("--out_dir=out/a", "--max_iters=8")
    first = json.loads(Path("out/a/run.json").read_text())
    out = train("--out_dir=out/a")[1]
    run, found = json.loads(Path("out/a/run.json").read_text()), rows("out/a")
    assert run["settings"] == checkpoint.load("out/a/ckpt.pt")["config"] | {"wandb_tags": []}
    assert run["command"][0] == "train.py" and run["command"][-1] == "--out_dir=out/a"
    assert run["data"]["tokens"] == data.Dataset("tiny").splits["train"]["tokens"]
    assert (run["step"], run["tokens"], run["parameters"]) == (12, 12 * 128, GPTConfig(257, 257, 1, 2, 16).num_params())
    losses = [row["val_loss"] for row in found if "val_loss" in row]
    assert (run["best_val_loss"], run["final_val_loss"]) == (min(losses), losses[-1])
    assert run["final_loss"] == found[-1]["loss"]
    assert run["seconds"] == pytest.approx(sum(128 / row["tokens_per_sec"] for row in found[1:]))
    assert run["seconds"] > first["seconds"] and run["started"] <= run["ended"] and run["peak_memory"] > 1e8
    assert f"val loss {losses[-1]:.4f}, the best {min(losses):.4f}" in out.splitlines()[-2]


def test_a_run_that_is_killed_has_its_settings_in_run_json(train, monkeypatch):
    def killed(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(train_py.GPT, "forward", killed)
    with pytest.raises(ZeroDivisionError):
        train("--out_dir=out/a")
    run = json.loads(Path("out/a/run.json").read_text())
    assert run["settings"]["n_layer"] == 1 and run["ended"] is None


def test_a_run_that_goes_on_keeps_the_time_at_which_it_started(train):
    train("--out_dir=out/a", "--max_iters=4", "--lr_decay_iters=12")
    path = Path("out/a/run.json")
    run = json.loads(path.read_text())
    for started in ("2001-02-03T04:05:06+00:00", 7):  # one that was written, and one that is none
        path.write_text(json.dumps(run | {"started": started}))
        assert train("--out_dir=out/a", "--max_iters=12")[0] == 0
        found = json.loads(path.read_text())["started"]
        assert (found == started) == isinstance(started, str) and isinstance(found, str)
        train("--out_dir=out/a", "--max_iters=4", "--lr_decay_iters=12", "--overwrite=True")
    assert json.loads(path.read_text())["started"] > "2026"


def test_an_evaluation_of_a_new_model_beside_a_run_says_how_the_run_s_is_evaluated(train, finished):
    losses = [row["val_loss"] for row in rows("out/a") if "val_loss" in row]
    for more, loss, hinted in (([], losses[0], True), (["--init_from=resume"], losses[-1], False)):
        out = train("--out_dir=out/a", "--eval_only=True", *more)[1]
        assert f"val loss {loss:.4f}" in out and ("--init_from=resume evaluates that" in out) == hinted


def test_a_shape_that_the_opened_model_does_not_have_is_said_to_be_unused(train, finished):
    out = train("--out_dir=out/b", "--init_from=out/a/final.pt", "--n_layer=3", "--bias=False", "--n_head=2")[1]
    assert "starting from out/a/final.pt; its own shape stays, without n_layer=3, bias=False\n" in out
    assert "shape" not in train("--out_dir=out/c", "--init_from=out/a/final.pt")[1]
    assert weights("out/b/final.pt").keys() == weights("out/a/final.pt").keys()


def test_the_command_at_the_end_can_be_pasted(train):
    name = "out/it's $HOME y"
    last = train(f"--out_dir={name}", "--max_iters=1")[1].splitlines()[-1]
    assert shlex.split(last.partition("; ")[2]) == ["python", "sample.py", f"--out_dir={name}"]
    assert "out_dir is empty" in train("--out_dir=")[2]


def test_the_time_of_a_branch_is_that_of_its_own_steps(train):
    train("--out_dir=out/a", "--save_interval=8")
    branch = "--out_dir=out/b", "--resume_from=out/a/ckpt_iter_8.pt"
    for more in (["--max_iters=10", "--lr_decay_iters=12"], []):  # The second command goes on with the branch.
        assert train(*branch, *more)[0] == 0
    run, found = json.loads(Path("out/b/run.json").read_text()), rows("out/b")
    assert [row["step"] for row in found] == [8, 9, 10, 11, 12] and found[0]["tokens_per_sec"]
    assert run["seconds"] == pytest.approx(sum(128 / row["tokens_per_sec"] for row in found[1:]))
    assert run["tokens_per_sec"] == pytest.approx(4 * 128 / run["seconds"])


@pytest.mark.parametrize("fault", [UserError("not installed"), ImportError("not installed")])
def test_a_tokenizer_that_is_not_there_ends_no_training(train, monkeypatch, fault):
    def missing(spec):
        raise fault

    monkeypatch.setattr(tokenizer, "load", missing)
    status, out, err = train("--out_dir=out/a", "--sample_tokens=5")
    assert status == 0 and "no sample: not installed" in out, err


def test_a_group_of_processes_is_left_without_what_wraps_the_model(train, monkeypatch):
    """A DDP that is freed after its group can hang."""
    wrapped, at_the_end = [], []

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return self.model(x, y)

    def wrap(model, *args):
        wrapped.append(weakref.ref(wrapper := Wrapper(model)))
        return wrapper

    def leave():
        gc.collect()
        at_the_end.append(wrapped[0]())

    monkeypatch.setattr(processes, "wrap", wrap)
    monkeypatch.setattr(processes, "leave", leave)
    assert train("--out_dir=out/a")[0] == 0
    assert at_the_end and not any(at_the_end)


def test_a_sample_shows_no_control_characters(train, monkeypatch):
    monkeypatch.setattr(tokenizer.BytesTokenizer, "decode", lambda self, ids: bytes(i % 160 for i in ids))
    train("--out_dir=out/a", "--sample_tokens=200", "--eval_interval=12")
    text = Path("out/a/samples.txt").read_text()
    assert len(text) > 300 and not [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_samples_while_it_learns_change_no_bit_of_the_run(train):
    train("--out_dir=out/a", "--eval_interval=6")
    out = train("--out_dir=out/b", "--eval_interval=6", "--sample_tokens=20")[1]
    assert same_final_weights("out/a", "out/b") and without_speed(rows("out/a")) == without_speed(rows("out/b"))
    beginning = bytes(data.Dataset("tiny").text_ids("val")[:16].astype("u1")).decode()
    parts = Path("out/b/samples.txt").read_text(errors="replace").split("---- step ")[1:]
    assert [part.partition(" ----\n")[0] for part in parts] == ["0", "6", "12"]
    for part in parts:
        text = part.partition("\n")[2]
        assert text.startswith(beginning + "|") and len(text) > len(beginning) + 5 and text.strip() in out
    assert not Path("out/a/samples.txt").exists()


@pytest.mark.parametrize(("compiled", "optimizer"), [("False", "adamw"), ("True", "adamw"), ("False", "muon")])
def test_resumed_equals_unbroken_to_the_bit(train, compiled, optimizer):
    """12 steps, against 5 steps, a stop, and 7 more, with dropout and accumulation."""
    args = f"--compile={compiled}", f"--optimizer={optimizer}", "--n_layer=2", "--save_interval=5"
    assert train("--out_dir=out/a", *args)[0] == 0
    status, out, _ = train("--out_dir=out/b", *args, "--resume_from=out/a/ckpt_iter_5.pt")
    assert status == 0 and "resuming out/a/ckpt_iter_5.pt at step 5" in out and "failed" not in out
    assert same_bits(weights("out/a/final.pt"), weights("out/b/final.pt"))
    assert same_bits(weights("out/a/best.pt"), weights("out/b/best.pt"))
    assert without_speed(rows("out/b")) == without_speed(rows("out/a"))[5:]
    a, b = (checkpoint.load(f"out/{run}/ckpt.pt") for run in "ab")
    for old, new in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert same_bits(old, new)


def test_compiled_blocks_compute_what_eager_ones_do(train):
    graphs = []
    for name in ("False", "True"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(f"--out_dir=out/{name}", f"--compile={name}", "--n_layer=2", "--dropout=0")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs == [0, 2]  # one block's, shared by all, and the loss's
    for a, b in zip(rows("out/False"), rows("out/True"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4)
    assert weights("out/True/final.pt").keys() == weights("out/False/final.pt").keys()


def test_recompute_trains_the_same_to_the_bit(train, monkeypatch):
    """Dropout is drawn again as it was; one block at a time is what is computed again."""
    recomputes = at_each_forward(monkeypatch, lambda model: model.recompute)
    train("--out_dir=out/a", "--n_layer=2")
    assert train("--out_dir=out/b", "--n_layer=2", "--recompute=True")[0] == 0
    assert recomputes == [False] * 24 + [True] * 24  # 12 steps of two micro-batches
    assert same_final_weights("out/a", "out/b")


@pytest.mark.parametrize("after", [0, 3, 4, 7])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(train, finished, monkeypatch, after):
    draw = data.batch
    calls = []

    def interrupted(*args):
        if len(calls) == 2 * after + 1:  # one batch is drawn ahead
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(args)
        return draw(*args)

    monkeypatch.setattr(data, "batch", interrupted)
    status, out, _ = train("--out_dir=out/b")
    assert status == 128 + signal.SIGTERM and "the same command goes on" in out
    assert checkpoint.load("out/b/ckpt.pt")["iter_num"] == after + 1
    monkeypatch.setattr(data, "batch", draw)
    status, out, _ = train("--out_dir=out/b")
    assert status == 0 and f"at step {after + 1}" in out
    assert same_bits(weights("out/a/final.pt"), weights("out/b/final.pt"))
    assert without_speed(rows("out/a")) == without_speed(rows("out/b"))


def test_what_goes_on_after_a_stop_is_said_truly(train, monkeypatch):
    """The same command with --overwrite=True would begin anew."""
    draw = data.batch

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(data, "batch", interrupted)
    assert "the same command goes on from out/a/ckpt.pt" in train("--out_dir=out/a")[1]
    said = train("--out_dir=out/a", "--overwrite=True")[1]
    assert "the same command without --overwrite goes on from out/a/ckpt.pt" in said


@pytest.mark.parametrize("step", [0, 4, 12])
def test_a_signal_in_an_evaluation_ends_it_after_its_batch_and_a_resume_makes_it(train, finished, monkeypatch, step):
    """The last one too: the run has not finished before it is evaluated."""
    nll, calls = GPT.nll, []
    per_evaluation = -(-(len(data.Dataset("tiny").text_ids("val")) - 1) // (16 * 4))  # batches

    def interrupted(self, x, y):
        calls.append(x)
        if len(calls) == per_evaluation * step // 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return nll(self, x, y)

    monkeypatch.setattr(GPT, "nll", interrupted)
    status, out, _ = train("--out_dir=out/b")
    assert status == 128 + signal.SIGTERM and f"stopped by a signal after step {step}" in out
    assert len(calls) == per_evaluation * step // 4 + 2 < per_evaluation * (step // 4 + 1)
    assert checkpoint.load("out/b/ckpt.pt")["iter_num"] == step and not Path("out/b/final.pt").exists()
    monkeypatch.setattr(GPT, "nll", nll)
    assert f"at step {step}" in train("--out_dir=out/b")[1]
    assert same_final_weights("out/a", "out/b") and without_speed(rows("out/a")) == without_speed(rows("out/b"))


def test_a_finished_run_says_so_and_a_longer_one_goes_on(train, finished):
    before = Path("out/a/ckpt.pt").read_bytes()
    status, out, _ = train("--out_dir=out/a")
    assert status == 0 and "has finished at step 12" in out and Path("out/a/ckpt.pt").read_bytes() == before
    status, out, _ = train("--out_dir=out/a", "--max_iters=14")
    assert status == 0 and "max_iters 12 -> 14" in out and [r["step"] for r in rows("out/a")] == list(range(15))


def test_what_alters_training_is_printed_and_takes_effect(train):
    train("--out_dir=out/a", "--max_iters=4")
    args = "--weight_decay=0.7", "--beta1=0.8", "--beta2=0.9", "--learning_rate=0.1", "--warmup_iters=0", "--dropout=0"
    _, out, _ = train("--out_dir=out/a", "--max_iters=5", "--decay_lr=False", *args)
    for change in (
        "weight_decay 0.1 -> 0.7",
        "beta1 0.9 -> 0.8",
        "beta2 0.95 -> 0.9",
        "learning_rate 0.01 -> 0.1",
        "dropout 0.2 -> 0.0",
    ):
        assert change in out
    ckpt = checkpoint.load("out/a/ckpt.pt")
    groups = ckpt["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and groups[0]["betas"] == (0.8, 0.9)
    assert rows("out/a")[-1]["lr"] == 0.1 and ckpt["model_args"]["dropout"] == 0.0


def test_muon_s_momentum_reaches_it_and_may_change(train):
    for out_dir, *args in (("out/a",), ("out/b", "--momentum=0.8"), ("out/c",)):
        train(f"--out_dir={out_dir}", "--optimizer=muon", "--max_iters=4", *args)
    assert same_bits(weights("out/a/final.pt"), weights("out/c/final.pt"))
    assert not same_bits(weights("out/a/final.pt"), weights("out/b/final.pt"))
    _, out, _ = train("--out_dir=out/a", "--optimizer=muon", "--max_iters=5", "--momentum=0.7", "--weight_decay=0.2")
    assert "momentum 0.95 -> 0.7" in out and "weight_decay 0.1 -> 0.2" in out
    groups = checkpoint.load("out/a/ckpt.pt")["optimizer"]["param_groups"]
    assert {g["momentum"] for g in groups} == {0.7} and [g["weight_decay"] for g in groups] == [0.2, 0.0, 0.2]


@pytest.mark.parametrize(
    "change",
    ["--n_layer=2", "--n_embd=32", "--seed=1", "--block_size=8", "--batch_size=2", "--bias=False", "--n_inner=8"],
)
def test_what_must_agree_is_refused_and_nothing_is_lost(train, finished, change):
    before = content("out/a")
    status, _, err = train("--out_dir=out/a", "--max_iters=16", change)
    assert status == 2 and len(err.splitlines()) == 1 and "can't be resumed" in err and "--overwrite" in err
    assert (change[2:].split("=")[0] if "batch" not in change else "tokens a step") in err
    assert content("out/a") == before


def test_other_tokens_are_refused(train, finished):
    prepare.write("tiny", tokenizer.BytesTokenizer(), [("train", "other " * 999, True), ("val", "text " * 99, True)], 1)
    status, _, err = train("--out_dir=out/a", "--max_iters=16")
    assert status == 2 and "tokens of data/tiny/train.bin are others" in err


def test_overwrite_starts_anew_but_not_when_torchrun_restarts(train, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train("--out_dir=out/a", "--max_iters=2")
    # Restarted before it came to clear the folder, and after.
    assert "resuming" not in train("--out_dir=out/a", "--overwrite=True", "--max_iters=4", "--save_interval=2")[1]
    assert "at step 4" in train("--out_dir=out/a", "--overwrite=True", "--max_iters=5", "--save_interval=2")[1]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    status, out, _ = train("--out_dir=out/a", "--overwrite=True", "--max_iters=3", "--n_layer=2")
    assert status == 0 and "resuming" not in out and [r["step"] for r in rows("out/a")] == [0, 1, 2, 3]
    assert not Path("out/a/ckpt_iter_2.pt").exists()


def test_an_evaluation_that_a_signal_put_off_ends_a_run_once(train, monkeypatch):
    coming, forward, count = iter([5.0, 6.0]), train_py.GPT.forward, [0]

    def call(self, x, y=None):
        count[0] += 1
        if count[0] == 2 * 4:  # micro-batches
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x, y)

    monkeypatch.setattr(train_py, "evaluate", lambda *args: next(coming))
    monkeypatch.setattr(train_py.GPT, "forward", call)
    args = "--out_dir=out/a", "--eval_interval=4", "--patience=1"
    assert train(*args)[0] == 128 + signal.SIGTERM
    assert "no better validation loss than 5.0000 in 1 evaluations" in train(*args)[1]
    assert "has finished at step 4" in train(*args)[1]


# ---- a new run from a checkpoint of another ----


def test_resume_from_goes_on_in_a_new_folder_to_the_same_bits_and_leaves_the_other_alone(train):
    train("--out_dir=out/a", "--save_interval=4")
    before = content("out/a")
    back = "--out_dir=out/b", "--save_interval=4", "--resume_from=out/a/ckpt_iter_4.pt"
    assert "resuming out/a/ckpt_iter_4.pt at step 4" in train(*back)[1]
    assert same_final_weights("out/a", "out/b") and content("out/a") == before
    assert without_speed(rows("out/b")) == without_speed(rows("out/a"))[4:]
    assert sorted(p.name for p in Path("out/b").glob("ckpt_iter_*")) == [f"ckpt_iter_{n}.pt" for n in (12, 4, 8)]
    assert "out/b has finished at step 12" in train(*back)[1]
    assert "resuming out/b/ckpt.pt at step 12" in train(*back, "--max_iters=13")[1]
    # Without the setting, and with it again, it is the same run.
    assert "resuming out/b/ckpt.pt at step 13" in train(*back[:2], "--max_iters=14")[1]
    assert "resuming out/b/ckpt.pt at step 14" in train(*back, "--max_iters=15")[1]
    assert content("out/a") == before


def test_a_new_run_from_a_checkpoint_is_on_the_disk_from_its_first_moment(train, monkeypatch):
    """A kill before its first step leaves a run with which the same command goes on."""
    train("--out_dir=out/a", "--save_interval=3")
    back = "--out_dir=out/b", "--save_interval=3", "--resume_from=out/a/ckpt_iter_3.pt"

    def killed(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(train_py.GPT, "forward", killed)
        with pytest.raises(ZeroDivisionError):
            train(*back)
    assert checkpoint.load("out/b/ckpt.pt")["iter_num"] == 3
    assert "resuming out/b/ckpt.pt at step 3" in train(*back)[1]
    assert same_final_weights("out/a", "out/b")
    assert without_speed(rows("out/b")) == without_speed(rows("out/a"))[3:]


@pytest.mark.parametrize(("at", "best"), [(4, 4), (5, 8)])
def test_the_best_of_a_new_run_is_the_checkpoint_it_began_from_or_a_later_one(train, monkeypatch, at, best):
    """The best weights of the run before, here those of step 0, stay in its own folder."""
    coming = iter([3.0, 4.0, 4.5, 4.6] + [4.5, 4.6])
    monkeypatch.setattr(train_py, "evaluate", lambda *args: next(coming))
    train("--out_dir=out/a", "--save_interval=1")
    train("--out_dir=out/b", f"--resume_from=out/a/ckpt_iter_{at}.pt")
    assert checkpoint.load("out/b/best.pt")["iter_num"] == best and next(coming, None) is None


def test_patience_counts_anew_in_a_new_run(train, monkeypatch):
    coming = iter([5.0, 4.0, 4.1, 4.2] + [4.3, 4.4])
    monkeypatch.setattr(train_py, "evaluate", lambda *args: next(coming))
    train("--out_dir=out/a", "--save_interval=12")
    args = "--out_dir=out/b", "--resume_from=out/a/ckpt_iter_12.pt", "--patience=2", "--max_iters=99"
    assert "no better validation loss than 4.2000 in 2 evaluations" in train(*args)[1] and next(coming, None) is None


def test_a_new_run_that_goes_on_with_settings_of_its_own(train):
    train("--out_dir=out/a", "--save_interval=4")
    back = "--out_dir=out/b", "--resume_from=out/a/ckpt_iter_4.pt", "--learning_rate=5e-3"
    assert "at step 4; learning_rate 0.01 -> 0.005" in train(*back)[1]
    assert rows("out/b")[1]["lr"] < rows("out/a")[5]["lr"] and not same_final_weights("out/a", "out/b")
    status, _, err = train(*back[:1], "--resume_from=out/a/ckpt_iter_4.pt", "--seed=1", "--out_dir=out/c")
    assert status == 2 and "seed was 1337 and is 1" in err and not Path("out/c").exists()


def test_a_new_run_from_a_run_that_began_from_other_weights_has_their_shape(train):
    train("--out_dir=out/base", "--n_layer=2", "--max_iters=4")
    train("--out_dir=out/a", "--init_from=out/base/final.pt", "--save_interval=4")
    train("--out_dir=out/b", "--resume_from=out/a/ckpt_iter_4.pt")
    assert same_final_weights("out/a", "out/b")
    assert checkpoint.load("out/b/ckpt.pt")["config"]["init_from"] == "out/base/final.pt"


def test_a_new_run_at_or_beyond_its_end(train):
    train("--out_dir=out/a", "--save_interval=4")
    status, out, _ = train("--out_dir=out/b", "--resume_from=out/a/ckpt_iter_4.pt", "--max_iters=4")
    assert status == 0 and "finished 4 steps" in out
    assert [checkpoint.load(f"out/b/{name}.pt")["iter_num"] for name in ("ckpt", "final")] == [4, 4]
    assert "at step 4" in train("--out_dir=out/b", "--max_iters=8")[1]
    status, _, err = train("--out_dir=out/c", "--resume_from=out/a/ckpt_iter_8.pt", "--max_iters=4")
    assert status == 2 and "is of step 8, this command ends at 4" in err and not Path("out/c").exists()


def test_a_damaged_checkpoint_leads_to_another_from_which_a_new_run_goes_on(train):
    train("--out_dir=out/a", "--save_interval=4")
    Path("out/a/ckpt.pt").write_bytes(Path("out/a/ckpt.pt").read_bytes()[:2000])
    before = content("out/a")
    for more in ((), ("--resume_from=out/a/ckpt_iter_4.pt",)):
        status, _, err = train("--out_dir=out/a", *more)
        assert status == 2 and "damaged" in err and "ckpt_iter_4.pt" in err and len(err.splitlines()) == 1
        assert "--resume_from=PATH and a new --out_dir" in err and content("out/a") == before
    assert train("--out_dir=out/b", "--resume_from=out/a/ckpt_iter_4.pt")[0] == 0
    assert same_final_weights("out/a", "out/b")
    # In place: the other file is copied over ckpt.pt.
    Path("out/a/ckpt.pt").write_bytes(before["ckpt_iter_4.pt"])
    assert "resuming out/a/ckpt.pt at step 4" in train("--out_dir=out/a", "--save_interval=4")[1]
    assert same_final_weights("out/a", "out/b") and [row["step"] for row in rows("out/a")] == list(range(13))


def test_a_disk_that_takes_no_checkpoint_of_a_new_run_is_found_out_at_once(train, monkeypatch):
    train("--out_dir=out/a", "--save_interval=4")
    before = content("out/a")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    status, out, err = train("--out_dir=out/b", "--resume_from=out/a/ckpt_iter_4.pt")
    assert status == 2 and "make room there" in err and "step 5/12" not in out and content("out/a") == before


def test_another_process_that_saves_while_this_one_starts_is_not_undone(train, monkeypatch):
    train("--out_dir=out/a", "--max_iters=4")
    early = Path("out/a/ckpt.pt").read_bytes()
    train("--out_dir=out/a")
    late = Path("out/a/ckpt.pt").read_bytes()
    Path("out/a/ckpt.pt").write_bytes(early)
    build = checkpoint.build

    def build_slowly(*args):
        Path("out/a/new").write_bytes(late)
        os.replace("out/a/new", "out/a/ckpt.pt")
        return build(*args)

    monkeypatch.setattr(checkpoint, "build", build_slowly)
    status, _, err = train("--out_dir=out/a", "--max_iters=20")
    assert status == 2 and "another process has just saved out/a/ckpt.pt" in err
    assert Path("out/a/ckpt.pt").read_bytes() == late


def test_what_init_from_names_is_not_overwritten(train, finished):
    for source in ("out/a", "out/a/best.pt", "out/../out/a"):
        status, _, err = train("--out_dir=out/a", f"--init_from={source}", "--overwrite=True")
        assert status == 2 and "would remove" in err
    Path("out/a/mine.pt").write_bytes(Path("out/a/best.pt").read_bytes())
    for out_dir, source in (
        ("out", "out/a/best.pt"),
        ("scratch", "scratch"),
        ("out/a", "out/a/mine.pt"),
    ):  # which stays
        assert train(f"--out_dir={out_dir}", f"--init_from={source}", "--overwrite=True", "--max_iters=1")[0] == 0
    assert Path("out/a/mine.pt").exists()


def test_a_validation_split_that_is_not_read_may_be_broken(train):
    Path("data/tiny/val.bin").write_bytes(b"")
    assert train("--out_dir=out/a", "--max_iters=1")[0] == 2
    assert train("--out_dir=out/a", "--max_iters=1", "--eval_interval=0")[0] == 0


def test_a_finished_run_keeps_its_final_weights_until_there_are_later_ones(train, monkeypatch):
    train("--out_dir=out/a", "--max_iters=4")
    kept = Path("out/a/final.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert train("--out_dir=out/a", "--max_iters=8")[0] == 2
    assert Path("out/a/final.pt").read_bytes() == kept
    assert train("--out_dir=out/a", "--max_iters=8")[0] == 0
    assert checkpoint.load("out/a/final.pt")["iter_num"] == 8


def test_init_from(train, finished):
    status, _, err = train("--out_dir=out/none", "--init_from=resume")
    assert status == 2 and "no out/none/ckpt.pt to resume" in err
    _, out, _ = train("--out_dir=out/b", "--init_from=out/a/final.pt", "--block_size=8", "--max_iters=1", "--dropout=0")
    assert "starting from out/a/final.pt" in out and "cropped the model's 16 positions to 8" in out
    assert rows("out/b")[0]["val_loss"] < rows("out/a")[0]["val_loss"] - 0.5
    assert "resuming" in train("--out_dir=out/a", "--init_from=scratch", "--max_iters=13")[1]
    status, _, err = train("--out_dir=out/c", "--init_from=out/a/final.pt", "--block_size=32")
    assert status == 2 and "--block_size=16" in err
    status, _, err = train("--out_dir=out/c", "--init_from=nowhere/to/be/found")
    assert status == 2 and len(err.splitlines()) == 1


def test_eval_only_writes_nothing_and_compiles_nothing(train, monkeypatch):
    train("--out_dir=out/a", "--max_iters=4")
    monkeypatch.setattr(train_py.runtime, "compile_parts", lambda *args: pytest.fail("compiled"))
    before = {p.name: p.read_bytes() for p in Path("out/a").iterdir()}
    last = rows("out/a")[-1]["val_loss"]
    _, out, _ = train("--out_dir=out/a", "--eval_only=True", "--init_from=resume", "--compile=True")
    assert f"val loss {last:.4f}" in out
    _, out, _ = train("--out_dir=out/a", "--eval_only=True")  # a fresh model: out_dir is not looked at
    assert f"val loss {rows('out/a')[0]['val_loss']:.4f}" in out
    assert content("out/a") == before


def test_epochs(train):
    tokens = data.Dataset("tiny").tokens("train")
    blocks = data.blocks_per_epoch(len(tokens), 16)
    half = "--out_dir=out/a", "--max_epochs=0.5", "--eval_interval=0", "--gradient_accumulation_steps=16"
    steps = math.ceil(0.5 * blocks / 64)
    assert f"{steps} steps by max_epochs=0.5\n" in train(*half)[1]
    assert f"has finished at step {steps}; raise max_epochs" in train(*half)[1]
    assert [r["step"] for r in rows("out/a")] == list(range(1, steps + 1))
    # Floats have 231.00000000000003 for 2.2 epochs of 735 sequences in steps of 7.
    whole = "--max_epochs=2.2", "--block_size=12", "--batch_size=7", "--gradient_accumulation_steps=1"
    assert "231 steps by max_epochs=2.2\n" in train("--eval_only=True", *whole)[1]
    assert rows("out/a")[-1]["epoch"] == pytest.approx(steps * 64 / blocks) and steps * 64 >= 0.5 * blocks
    train(
        "--out_dir=out/b", "--max_epochs=2", "--save_epochs=1", "--eval_interval=0", "--gradient_accumulation_steps=32"
    )
    ends = [checkpoint.load(f"out/b/ckpt_epoch_{e}.pt")["sequence_index"] for e in (1, 2)]
    assert all(e * blocks <= end < e * blocks + 128 for e, end in zip((1, 2), ends, strict=True))


def test_non_finite_steps_are_skipped_and_several_in_a_row_stop_the_run(train, monkeypatch):
    forward, count = GPT.forward, [0]

    def ill(bad):
        def call(self, x, y=None):
            count[0] += 1
            logits, loss = forward(self, x, y)
            return logits, loss * float("nan") if count[0] in bad else loss

        return call

    monkeypatch.setattr(GPT, "forward", ill({6}))
    status, out, _ = train("--out_dir=out/a")
    assert status == 0 and out.count("skipped") == 1 and checkpoint.load("out/a/ckpt.pt")["skipped_steps"] == 1
    count[0] = 0
    monkeypatch.setattr(GPT, "forward", ill(set(range(12, 99))))
    status, _, err = train("--out_dir=out/b")
    assert status == 2 and "not finite" in err and checkpoint.load("out/b/ckpt.pt")["iter_num"] == 8
    assert all(p.isfinite().all() for p in weights("out/b/ckpt.pt").values())


def test_compile_that_fails_goes_on_eager(train, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    status, out, _ = train("--out_dir=out/a", "--compile=True")
    assert status == 0 and "going on without it" in out and rows("out/a")[-1]["step"] == 12


@pytest.mark.parametrize(
    ("batch", "advice"), [(6, "--batch_size=3 --gradient_accumulation_steps=4"), (1, "smaller model")]
)
def test_out_of_memory_says_which_batch_trains_the_same(train, monkeypatch, batch, advice):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "forward", full)
    status, _, err = train("--out_dir=out/a", f"--batch_size={batch}")
    assert status == 2 and "out of memory" in err and len(err.splitlines()) == 1
    assert advice in err or (batch == 1 and "smaller block_size" in err)


@pytest.mark.parametrize(
    "args",
    [
        ["--overwrite=True", "--init_from=resume"],
        ["--seed=1e30"],
        ["--n_head=3"],
        ["--batch_size=0"],
        ["--dropout=1"],
        ["--learning_rate=-1"],
        ["--device=tpu"],
        ["--device=cuda:99"],
        ["--dtype=float16"],
        ["--dataset=nothing"],
        ["--block_size=100000"],
        ["--resume_from=out/none.pt"],
        ["config/none.py"],
        ["--batchsize=3"],
    ],
)
def test_a_mistake_is_one_line_and_status_2(train, args):
    status, _, err = train("--out_dir=out/a", *args)
    assert status == 2 and len(err.splitlines()) == 1 and not Path("out/a").exists()


def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_bits(corpus, train):
    """The script as a process, ended by SIGKILL once it has saved."""
    args = [*TINY, "--max_iters=150", "--eval_interval=50", "--eval_iters=1", "--log_interval=50"]
    command = [sys.executable, str(ROOT / "train.py"), *args, "--out_dir=out/b"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    killer = threading.Timer(120, process.kill)
    killer.start()
    while not Path("out/b/ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    killer.cancel()
    step = checkpoint.load("out/b/ckpt.pt")["iter_num"]
    assert 0 <= step < 150
    train("--out_dir=out/a", *args)
    _, out, _ = train("--out_dir=out/b", *args)
    assert f"at step {step}" in out and same_bits(weights("out/a/final.pt"), weights("out/b/final.pt"))
    assert without_speed(rows("out/a")) == without_speed(rows("out/b")) and not list(Path("out/b").glob("*.partial"))


def test_a_folder_with_checkpoints_but_no_ckpt_is_left_alone(train, finished):
    Path("out/a/ckpt.pt").unlink()
    before = content("out/a")
    status, _, err = train("--out_dir=out/a")
    assert status == 2 and "no ckpt.pt" in err and "--overwrite=True" in err
    status, _, err = train("--out_dir=out/a", "--init_from=out/a/best.pt", "--overwrite=True")
    assert status == 2 and "out/a/best.pt itself" in err
    assert content("out/a") == before


def test_an_end_cut_short_is_made_good(train, finished):
    """A kill after the last ckpt.pt, before the last row and final.pt."""
    done, final = without_speed(rows("out/a")), weights("out/a/final.pt")
    for name in ("final.pt", "best.pt"):
        Path("out/a", name).unlink()
    lines = Path("out/a/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("out/a/metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:9])
    assert train("--out_dir=out/a")[0] == 0
    assert without_speed(rows("out/a")) == done and same_bits(weights("out/a/final.pt"), final)
    assert Path("out/a/best.pt").exists() == (done[-1]["val_loss"] == min(r.get("val_loss", 99) for r in done))


def test_an_out_dir_that_cannot_be_is_one_line(train):
    Path("afile").write_text("")
    for name in ("afile", "afile/sub"):
        status, _, err = train(f"--out_dir={name}")
        assert status == 2 and len(err.splitlines()) == 1 and "can't be written" in err
