"""SIGKILL at random instants, half of them while a checkpoint is being written: the same command goes on, and the final
weights are the bits of a run that nothing happened to. And groups of processes that end by themselves do end.

`python -m pytest -m stress tests/test_kills.py` takes about five minutes.
"""

import multiprocessing
import os
import random
import shutil
import socket
import sys
import time

import train as train_py
from lib import checkpoint, settings
from lib.settings import UserError

import pytest
import torch
from conftest import TINY, rows, same_bits, weights, without_speed

pytestmark = pytest.mark.stress

KILLS = 50  # of each configuration
ENDS = 15  # of groups of four processes
PATIENCE = 30  # seconds that the others of a group have to notice that one of them has died

STARTED, MET = "started", "M parameters"  # what is in a process's log before, and after it has met the others

# Each run saves at every step, so that there is much to be interrupted.
ARGS = [*TINY, "--max_iters=50", "--eval_interval=1", "--eval_iters=1", "--out_dir=run"]
CONFIGURATIONS = {
    "dropout and accumulation": (1, []),
    "kept checkpoints, many epochs": (1, ["--save_interval=3", "--save_epochs=1", "--batch_size=32", "--seed=7"]),
    "no dropout, only what is better": (1, ["--dropout=0", "--always_save_checkpoint=False", "--eval_interval=2"]),
    "two processes": (2, ["--gradient_accumulation_steps=4"]),
}

# Processes are forked from one that has imported everything, so that they are up in a tenth of a second.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["train", "torch._dynamo"])


def process_main(folder, args, env, switch_interval):
    sys.setswitchinterval(switch_interval)
    os.chdir(folder)
    os.environ.update(env)
    log = os.open(f"log{env['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train.py", *args]
    torch.set_num_threads(1)
    settings.run(train_py.main)


class Run:
    """A command in a folder of its own, started as often as need be."""

    def __init__(self, corpus, name, world_size, args, switch_interval=0.005):
        self.folder, self.world_size, self.args = corpus / name, world_size, [*ARGS, *args]
        self.switch_interval = switch_interval  # seconds that a thread may hold Python's lock; 0.005 is Python's own
        self.out = self.folder / "run"
        self.folder.mkdir()
        (self.folder / "data").symlink_to(corpus / "data")

    def start(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {"WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        envs = [env | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(self.world_size)]
        with open(self.folder / "log0", "a") as log:
            print(STARTED, file=log)
        processes = [
            forked.Process(target=process_main, args=(self.folder, self.args, env, self.switch_interval), daemon=True)
            for env in envs
        ]
        for process in processes:
            process.start()
        return processes

    def finish(self):
        """Go on to the end. Returns the seconds that took."""
        began, processes = time.monotonic(), self.start()
        for process in processes:
            process.join(120)
        assert [p.exitcode for p in processes] == [0] * self.world_size, (self.folder / "log0").read_text()[-2000:]
        return time.monotonic() - began

    def outcome(self):
        """Final weights, and the logged rows without their speed."""
        return weights(self.out / "final.pt"), without_speed(rows(self.out))


def same(a, b):
    return same_bits(a[0], b[0]) and a[1] == b[1]


def wait_for_a_write(out, process):
    while process.exitcode is None and not any(out.glob("*.partial")):
        time.sleep(0.0002)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_at_random_moments_a_run_ends_at_the_same_bits(corpus, name):
    unbroken, broken = (Run(corpus, kind, *CONFIGURATIONS[name]) for kind in ("unbroken", "broken"))
    unbroken.finish()
    shutil.rmtree(unbroken.out)
    seconds = unbroken.finish()  # the first one had to start the server of processes, too
    wanted, chance = unbroken.outcome(), random.Random(name)
    killed = during_a_write = unreadable = different = ended = 0
    while killed < KILLS:
        processes = broken.start()
        if killed % 2:
            time.sleep(chance.uniform(0, 0.5 * seconds))
            wait_for_a_write(broken.out, processes[0])
            time.sleep(chance.uniform(0, 0.008))
        else:
            time.sleep(chance.uniform(0, seconds))
        alive = all(p.exitcode is None for p in processes)
        during_a_write += any(broken.out.glob("*.partial"))
        # One of them alone only when they have met: until then it is torchrun that ends those who wait for it.
        met = MET in (broken.folder / "log0").read_text().rpartition(STARTED)[2] and alive
        victims = processes if killed % 4 < 2 or not met else processes[:1] if killed % 8 < 4 else processes[-1:]
        for process in victims:
            process.kill()
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode is not None, "a process outlived another of its group"
        if all(p.exitcode == 0 for p in processes):  # it was faster
            ended, different = ended + 1, different + (not same(broken.outcome(), wanted))
            shutil.rmtree(broken.out)
            continue
        killed += alive
        if (broken.out / "ckpt.pt").exists():
            try:
                checkpoint.load(broken.out / "ckpt.pt")
            except UserError:
                unreadable += 1
    broken.finish()
    different += not same(broken.outcome(), wanted)
    print(
        f"{name}: {killed} kills, {during_a_write} of them during a write; {ended + 1} ends, {different} of them "
        f"different; {unreadable} unreadable checkpoints"
    )
    assert during_a_write >= KILLS // 4 and (different, unreadable) == (0, 0)
    assert not list(broken.out.glob("*.partial"))


def test_a_group_of_processes_ends(corpus):
    """A DDP that is freed after its group waits for a thread of gloo that waits for Python's lock. A thread that keeps
    the lock for long makes that likely."""
    group = Run(corpus, "group", 4, ["--max_iters=2", "--gradient_accumulation_steps=4"], switch_interval=10)
    for _ in range(ENDS):
        group.finish()
        shutil.rmtree(group.out)
