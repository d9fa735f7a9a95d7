"""bench.py: what it measures of processes, and a whole pass over the scripts."""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import bench
from lib import settings
from lib.settings import UserError

import pytest
import torch
from conftest import call_script, refusal
from torch.utils.flop_counter import FlopCounterMode

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--batch_size=4", "--steps=2", "--device=cpu"]
SMALL += ["--eval_tokens=500", "--max_new_tokens=8", "--compile=False"]


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench.py", *args])
    bench.main()


def test_a_process_is_timed_and_its_memory_is_its_own(tmp_path):
    wait = "import time; print('ready'); time.sleep(0.5); x = bytearray(300_000_000); print(f'{1234.5:,} tokens/s')"
    lines, memory = bench.run(tmp_path, "-c", wait)
    assert [line for _, line in lines] == ["ready", "1,234.5 tokens/s"]
    assert 0.5 <= lines[1][0] - lines[0][0] < 3
    assert 300e6 < memory["peak_memory"] < 400e6
    _, memory = bench.run(tmp_path, "-c", "pass")
    assert memory["peak_memory"] < 100e6
    assert bench.number(r"([\d,.]+) tokens/s", lines) == 1234.5


def test_a_script_that_fails_ends_it_with_its_own_last_line(tmp_path):
    with pytest.raises(UserError, match="the reason"):
        bench.run(tmp_path, "-c", "import sys; sys.exit('the reason')")


def test_the_shortest_of_several_runs_counts():
    pauses = iter([0.3, 0.05] + [0.3] * 9)
    found = bench.best_seconds(lambda: time.sleep(next(pauses)), torch.device("cpu"), seconds=1)
    assert 0.05 <= found < 0.25


def test_the_limits_are_operations_and_bytes_over_seconds(monkeypatch):
    """The operations as torch counts them; the bytes of a matrix of 2^27 numbers."""
    counted = []

    def half_a_second(work, device):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return 0.5

    monkeypatch.setattr(bench, "best_seconds", half_a_second)
    s, cpu = bench.Settings(n_embd=24, block_size=32, batch_size=2), torch.device("cpu")
    assert bench.matmul_rate(s, cpu, torch.float32, training=True) == 2 * counted[0] == 2 * 2 * 64 * 24 * 96
    assert bench.bandwidth(cpu) == 2 * 4 * 2**27


def test_the_median_step_counts_without_the_first_ones():
    rows = [{"step": i + 1, "tokens_per_sec": rate} for i, rate in enumerate([999, 1, 20, 90, 10])]
    assert bench.training_rate(rows) == 20


@pytest.mark.parametrize(
    "args",
    [
        ["--jobs=trian"],
        ["--steps=-1"],
        ["--peer=no/such/folder"],
        ["--peer=."],
        ["--eval_tokens=1"],
        ["--n_embd=33", "--n_head=2"],
        ["--jobs=eval", "--trace=t.json"],
        ["--json=no/such/folder.json"],
        ["--json=."],
        ["--trace=/"],
        ["--text=."],
        ["--text=no/*.txt"],
    ],
)
def test_a_mistake_is_refused_before_anything_runs(monkeypatch, capsys, args):
    monkeypatch.setattr(bench, "run", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as end:
        settings.run(lambda: call(monkeypatch, *args))
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_sampling_and_what_it_stands_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e12)
    monkeypatch.setattr(bench, "bandwidth", lambda *a: 1e10)
    said, heard, run = [], [], bench.run

    def listen(folder, script, *args, **more):
        if script.stem == "prepare_text":
            return run(folder, script, *args, **more)
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            assert call_script(script.stem, *args) == 0
        lines = output.buffer.getvalue().decode(errors="replace").splitlines()
        said.append(lines[-1])
        heard.extend(lines)
        return [(0.0, line) for line in lines], {"peak_memory": 1}

    monkeypatch.setattr(bench, "run", listen)
    (tmp_path / "text.txt").write_text("Some words, and some others.\n" * 400)
    jobs = ["sample", "sample_float16"]
    call(monkeypatch, *SMALL, f"--jobs={','.join(jobs)}", f"--text={tmp_path}/*.txt", f"--json={tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert list(found) == jobs
    weights = 50257 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16  # without positions
    for job, line, size in zip(jobs, said[-2:], (4, 2), strict=True):
        assert f", {found[job]['tokens_per_sec']:,.1f} tokens/s, the first" in line
        assert found[job]["limit"] == pytest.approx(1e10 / (size * weights), rel=0.01)
    assert any("dtype float16" in line for line in heard)
    assert f"{found[job]['limit']:,.0f}" in capsys.readouterr().out.splitlines()[-1]


PEER = """
import sys
sys.path.insert(0, ".")
import configurator  # It lies where the command runs, as nanoGPT reads it.
print("iter 0: loss 10.9, time 9000.00ms, mfu -100.00%")
for i in range(1, 7):
    print(f"iter {i}: loss 10.9, time {100 * i:.2f}ms, mfu 1.00%")
open("peer.txt", "w").write(" ".join(sys.argv[1:]))
"""


def test_a_peer_has_the_same_work_and_the_median_of_its_steps_counts(tmp_path):
    (tmp_path / "nanoGPT").mkdir()
    for name, text in (("train.py", PEER), ("model.py", ""), ("configurator.py", "")):
        (tmp_path / "nanoGPT" / name).write_text(text)
    s = bench.Settings(
        peer=str(tmp_path / "nanoGPT"), batch_size=4, gradient_accumulation_steps=2, block_size=32, steps=5
    )
    found = bench.peer_training(s, tmp_path, ["--device=cpu", "--dtype=float32"])
    assert found["tokens_per_sec"] == pytest.approx(4 * 2 * 32 / 0.4)  # 200 to 600 ms
    args = (tmp_path / "peer.txt").read_text().split()
    assert {"--batch_size=4", "--gradient_accumulation_steps=2", "--block_size=32", "--compile=False"} <= set(args)


GPU_JOBS = "prepare train muon dropout largest muon_largest eval sample samples sample_float16"


def test_what_is_left_open_is_chosen_for_the_device(monkeypatch):
    for device, jobs, batch in (("cpu", "prepare train eval sample", 1), ("cuda", GPU_JOBS, 16)):
        s = bench.Settings(device=device, steps=3)
        bench.check(s)
        assert (s.jobs, s.batch_size, s.steps) == (tuple(jobs.split()), batch, 3)


def test_what_was_not_compiled_is_said(tmp_path, capsys):
    bench.run(tmp_path, "-c", "print('compile failed (no compiler); going on without it'); print('one'); print('two')")
    assert capsys.readouterr().out == "compile failed (no compiler); going on without it\n"


def test_a_program_finds_lib_and_what_the_user_has_on_the_path(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/packaged.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    lines, _ = bench.run(tmp_path, "-c", "import packaged, lib.settings; print('both')")
    assert lines[-1][1] == "both"


def test_a_failure_names_what_failed(tmp_path):
    (tmp_path / "some.py").write_text("raise ValueError('so it is')")
    for command, name in ((["-c", "1 / 0", "*.py"], "python"), ([tmp_path / "some.py"], "some.py")):
        assert refusal(bench.run, tmp_path, *command).startswith(f"{name} failed: ")


ENDLESS = """
import os, signal, sys, time
print("ready", flush=True)
os.kill(int(sys.argv[1]), signal.SIGTERM)
time.sleep(1000)
"""


def within(folder):
    """The processes that work in a folder."""
    return [p for p in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(p).startswith(str(folder))]


def test_an_interrupt_ends_the_script_and_leaves_nothing(monkeypatch, tmp_path):
    """SIGTERM to bench.py alone, in the middle of a script that has no end: that ends, and the folder is gone."""
    folders = []

    def measure(s, folder):
        folders.append(folder)
        bench.run(folder, "-c", ENDLESS, os.getpid())

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert call_script("bench") == 128 + signal.SIGTERM
    [folder] = folders
    assert folder.parent == tmp_path and not folder.exists()
    until = time.monotonic() + 30  # A process that is killed dies when it gets a core.
    while within(folder) and time.monotonic() < until:
        time.sleep(0.01)
    assert not within(folder)


@pytest.mark.slow
def test_all_jobs_and_a_trace(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e12)
    jobs = "--jobs=" + ",".join(bench.JOBS)
    call(monkeypatch, *SMALL, jobs, f"--json={tmp_path}/found.json", f"--trace={tmp_path}/trace.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert list(found) == list(bench.JOBS)
    for figures in found.values():
        assert 0 < figures["tokens_per_sec"] and 0 < figures["limit"]
        assert 20e6 < figures["peak_memory"] < 5e9
    assert found["prepare"]["tokens_per_sec"] < 2 * found["prepare"]["limit"]
    weights = 50257 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16  # without positions
    operations = 6 * weights + 12 * 1 * 16 * 32  # to a token: forward and backward
    assert found["train"]["limit"] == pytest.approx(1e12 / operations, rel=0.001)
    assert found["eval"]["limit"] == pytest.approx(3e12 / operations, rel=0.001)  # forward alone
    assert 0 < found["train"]["first_step_warm"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert "aten::addmm" in names and "aten::normal_" not in names  # steps alone, not the drawing of the weights
    assert sum(name.startswith("Optimizer.step#") for name in names) == 3
    shown = capsys.readouterr().out.splitlines()
    assert "where the time goes:" in shown
    assert [line.split()[0] for line in shown[-5:]] == ["job", *found]
