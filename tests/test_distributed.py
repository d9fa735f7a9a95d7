"""Several processes: the batches, losses and weights of one. gloo on the CPU, launched as the README says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from conftest import TINY

import checkpoint
import train as train_py

ROOT = Path(train_py.__file__).parent
ARGS = [*TINY, "--max_iters=20", "--gradient_accumulation_steps=4", "--eval_interval=10"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(*args):
    """torchrun's own module, as a process."""
    command = [sys.executable, "-m", "torch.distributed.run", *args, str(ROOT / "train.py"), *ARGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)


def losses(out):
    found = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in found for key in ("loss", "val_loss", "grad_norm") if key in r]


def difference(a, b):
    a, b = (checkpoint.load(f"{out}/final.pt")["model"] for out in (a, b))
    return max((a[k] - b[k]).abs().max().item() for k in a)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one_does(train):
    """20 steps with dropout and accumulation. The sums are taken in another order, so float32 rounding may differ."""
    assert train(*ARGS[len(TINY) :], "--out_dir=out/one")[0] == 0
    process = launch("--standalone", "--nproc_per_node=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "2 processes" in output and output.count("step 20/20") == 1  # one of them speaks
    pairs = list(zip(losses("out/one"), losses("out"), strict=True))
    assert len(pairs) == 20 + 20 + 3
    worst = max(abs(a - b) for a, b in pairs)
    print(f"largest difference of losses and norms {worst:.1e}, of weights {difference('out/one', 'out'):.1e}")
    assert worst < 1e-4 and difference("out/one", "out") < 1e-4


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
    status, _, err = train("--out_dir=out/a")
    assert status == 2 and "--gradient_accumulation_steps=3" in err and len(err.splitlines()) == 1


def test_a_process_that_prepares_for_longer_than_the_group_s_patience_times_no_other_out(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time, torch, runtime\n"
        "from datetime import timedelta\n"
        "runtime.GROUP_TIMEOUT = timedelta(seconds=2)\n"
        "time.sleep(6 if os.environ['RANK'] == '1' else 0)\n"
        "rt = runtime.choose('cpu')\n"
        "runtime.start_processes(rt, 'gloo')\n"
        "print(int(rt.sum(torch.tensor(rt.rank + 1))))\n"
        "runtime.leave_processes()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "slow.py"]
    env = ENV | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("3") == 2, done.stderr
