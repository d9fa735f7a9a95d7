"""Several processes: the batches, losses and weights of one. gloo on the CPU, launched as the README says."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from lib import checkpoint

import pytest
from conftest import ROOT, TINY, rows

ARGS = [*TINY, "--n_layer=2", "--max_iters=20", "--gradient_accumulation_steps=4", "--eval_interval=10"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(*args, script=ROOT / "train.py", settings=(), **more):
    """torchrun's own module, as a process."""
    command = [sys.executable, "-m", "torch.distributed.run", *args, str(script), *ARGS, *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, **more)


def finish(*args, **more):
    process = launch(*args, **more)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(out):
    return [r[key] for r in rows(out) for key in ("loss", "val_loss", "grad_norm") if key in r]


def difference(a, b):
    a, b = (checkpoint.load(f"{out}/final.pt")["model"] for out in (a, b))
    return max((a[k] - b[k]).abs().max().item() for k in a)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_equal(what):
    """Losses, norms and weights of out/one and of out. Another order of the sums may round them differently."""
    pairs = list(zip(losses("out/one"), losses("out"), strict=True))
    assert len(pairs) == 20 + 20 + 3
    worst = max(abs(a - b) for a, b in pairs)
    print(f"{what}: largest difference of losses and norms {worst:.1e}, of weights {difference('out/one', 'out'):.1e}")
    assert worst < 1e-4 and difference("out/one", "out") < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.stress)])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_several_processes_train_as_one_does(train, processes, optimizer):
    """20 steps with dropout and accumulation."""
    assert train(*ARGS[len(TINY) :], f"--optimizer={optimizer}", "--out_dir=out/one")[0] == 0
    output = finish("--standalone", f"--nproc_per_node={processes}", settings=[f"--optimizer={optimizer}"])
    assert f"{processes} processes" in output and output.count("step 20/20") == 1  # one of them speaks
    check_equal(f"{processes} processes")


@pytest.mark.stress
def test_four_processes_go_on_to_the_same_bits(corpus):
    """Of three and more it matters in which order they are summed."""
    more = ["--save_interval=7", "--out_dir=out/whole"]
    finish("--standalone", "--nproc_per_node=4", settings=more)
    finish("--standalone", "--nproc_per_node=4", settings=["--max_iters=7", "--lr_decay_iters=20"])
    finish("--standalone", "--nproc_per_node=4")
    assert difference("out/whole", "out") == 0


@pytest.mark.stress
def test_a_run_changes_its_number_of_processes_at_a_resume(train):
    assert train(*ARGS[len(TINY) :], "--out_dir=out/one")[0] == 0
    until = [f"--max_iters={n}" for n in (8, 14)]
    finish("--standalone", "--nproc_per_node=2", settings=[until[0], "--lr_decay_iters=20"])
    assert train(*ARGS[len(TINY) :], until[1], "--lr_decay_iters=20")[0] == 0
    finish("--standalone", "--nproc_per_node=2")
    kept = rows("out")
    for row in kept:  # The one run made no evaluations where the others stopped.
        if row["step"] % 10:
            row.pop("val_loss", None)
    Path("out/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    check_equal("two, one and two processes")


def workers(launcher):
    """The process ids of a launcher's workers, once they train."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_for("step 4/", launcher)
    return [int(pid) for pid in children.read_text().split()]


def wait_for(text, launcher, seconds=60):
    """Read a launcher's output up to a line with this text."""
    killer = threading.Timer(seconds, launcher.kill)
    killer.start()
    found = any(text in line for line in launcher.stdout)
    killer.cancel()
    assert found, f"{text!r} did not come"


@pytest.mark.stress
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_ends_the_others_and_torchrun_s_restart_goes_on(corpus, rank):
    """To the very bits of two processes that lived."""
    more = ["--eval_interval=2", "--max_iters=600", "--eval_iters=1", "--log_interval=2"]
    finish("--standalone", "--nproc_per_node=2", settings=[*more, "--out_dir=out/whole"])
    process = launch("--standalone", "--nproc_per_node=2", "--max-restarts=2", settings=more)
    victims = workers(process)
    os.kill(victims[rank], signal.SIGKILL)
    wait_for("resuming out/ckpt.pt", process)
    rest, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "finished 600 steps" in rest
    assert difference("out/whole", "out") == 0 and losses("out/whole") == losses("out")


@pytest.mark.stress
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_together_with_a_checkpoint(corpus, number):
    more = ["--eval_interval=300", "--max_iters=800", "--eval_iters=1", "--log_interval=2"]
    finish("--standalone", "--nproc_per_node=2", settings=[*more, "--out_dir=out/whole"])
    process = launch("--standalone", "--nproc_per_node=2", settings=more, start_new_session=True)
    workers(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches them all
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and output.count("stopped by a signal after step") == 1, output
    assert 0 < checkpoint.load("out/ckpt.pt")["iter_num"] < 800
    assert "resuming" in finish("--standalone", "--nproc_per_node=2", settings=more)
    assert difference("out/whole", "out") == 0 and losses("out/whole") == losses("out")


@pytest.mark.stress
def test_a_best_that_the_first_could_not_write_is_none_for_the_others(corpus):
    """Else they would disagree on when patience is at an end, and wait for each other."""
    Path("ill.py").write_text(f"""
import errno, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from lib import checkpoint, settings
losses, save = iter([5.0, 4.0, 4.5, 4.6]), checkpoint.save
def full_disk(path, state, links=()):
    if path.name == "best.pt" and state["best_val_loss"] == 4.0:
        raise OSError(errno.ENOSPC, "No space left on device")
    save(path, state, links)
def evaluate(*args):
    return next(losses)
checkpoint.save, train.evaluate = full_disk, evaluate
settings.run(train.main)
""")
    output = finish(
        "--standalone", "--nproc_per_node=2", script="ill.py", settings=["--eval_interval=4", "--patience=1"]
    )
    assert "best.pt could not be written" in output
    assert "no better validation loss than 4.5000 in 1 evaluations" in output
    assert checkpoint.load("out/best.pt")["iter_num"] == 8


@pytest.mark.stress
def test_two_launchers_meet_at_a_rendezvous(train):
    """The README's command for two machines, both of them this one."""
    assert train(*ARGS[len(TINY) :], "--out_dir=out/one")[0] == 0
    where = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    both = [launch("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", where) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert max(abs(a - b) for a, b in zip(losses("out/one"), losses("out"), strict=True)) < 1e-4


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    status, _, err = train("--out_dir=out/a")
    assert status == 2 and "--gradient_accumulation_steps=3" in err and len(err.splitlines()) == 1
