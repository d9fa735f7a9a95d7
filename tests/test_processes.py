"""lib/processes.py: what the environment says, how processes meet, and signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from lib import processes, runtime

import pytest
import torch
from conftest import ROOT, refusal

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK="1", ...) sets these variables and none of the others, and gives what is read of them."""

    def read(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return processes.environment()

    return read


def test_the_environment_is_one_process_s_or_torchrun_s(environment):
    assert environment() == environment(RANK="0", WORLD_SIZE="1") == [0, 1, 0, 0]
    assert environment(RANK="6", WORLD_SIZE="8", LOCAL_RANK="2", TORCHELASTIC_RESTART_COUNT="3") == [6, 8, 2, 3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "abc", "-1", "1.0", " 1", "1e3", "\N{FULLWIDTH DIGIT ONE}", "9" * 30])
def test_what_is_no_number_is_named(environment, name, value):
    says = refusal(environment, **{"RANK": "0", "WORLD_SIZE": "2"} | {name: value})
    assert f"{name}={value}" in says and "unset" in says


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
    ],
)
def test_a_stray_variable_is_no_process_that_trains_in_silence(environment, variables):
    assert "do not describe a group of processes" in refusal(environment, **variables)


@pytest.fixture
def stop():
    """A StopSignal of a single process. The handlers of before come back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may be run under nohup, which ignores it.
    yield processes.StopSignal(runtime.choose("cpu"))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_says_so_at_once(stop, capfd, number):
    os.kill(os.getpid(), number)
    assert stop.number == number and stop.status() == 128 + number
    assert capfd.readouterr().err == "stopping after this step, with a checkpoint; once more stops at once\n"


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = processes.StopSignal(runtime.choose("cpu"))
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in (others | {signal.SIGHUP: before}).items():
            signal.signal(number, handler)


def test_a_stop_that_another_process_was_asked_for_has_a_status_too(stop):
    assert stop.number == 0 and stop.status() == 128 + signal.SIGTERM


def test_a_second_signal_stops_at_once_but_not_within_a_second(stop, monkeypatch, capfd):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # the same request, which somebody else told too
    assert stop.number == signal.SIGTERM and capfd.readouterr().err.count("\n") == 1
    killed = []
    monkeypatch.setattr(signal, "raise_signal", killed.append)
    monkeypatch.setattr(stop, "at", stop.at - 2)
    stop.receive(signal.SIGINT, None)
    assert killed == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_processes_meet_though_the_store_remembers_those_who_died():
    """Three times three of them, each time with what is left of the meetings before."""
    store, met = torch.distributed.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            # The one who calls the meeting comes last, so that the others find what is left of the one before.
            later = [pool.submit(processes.meet, store, rank, 3) for rank in (2, 1)]
            time.sleep(0.25)
            names = {pool.submit(processes.meet, store, 0, 3).result(10), *(f.result(10) for f in later)}
        assert len(names) == 1
        met += names
    assert len(set(met)) == 3


# Two processes and the store of torchrun, for one import of torch.
MEET = """
import os, sys, time, torch
from datetime import timedelta
from lib import processes, runtime
processes.GROUP_TIMEOUT = timedelta(seconds=0.5)
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
children = []
for rank in (0, 1):
    if not (child := os.fork()):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        time.sleep(1.2 * rank)
        rt = runtime.choose("cpu")
        processes.meet_all(rt, "gloo")
        print(int(rt.sum(torch.tensor(rt.rank + 1))), flush=True)
        processes.leave()
        os._exit(0)  # The store has a thread, which only the first process may wait for.
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_a_process_that_prepares_for_longer_than_the_group_s_patience_times_no_other_out():
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEET], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    _, met, sums = done.stdout.partition("wants it")
    assert done.returncode == 0 and met and sums.count("3") == 2, done.stderr


def test_processes_of_different_commands_or_data_do_not_train_together():
    """Each would read data of its own. Paths and devices may be those of a machine."""
    s = SimpleNamespace(seed=1, out_dir="out", device="cuda", dtype="auto")

    def differ(other):
        rt = SimpleNamespace(dtype=torch.float32, gather=lambda facts: compared.update(facts) or [facts, facts | other])
        processes.check_agreement(rt, s, {"train": "abc"})

    compared = {}

    differ({})
    assert "differ in seed (1 and 2), n (None and 3);" in refusal(differ, {"seed": 2, "n": 3})
    assert "train.bin's sha256 (abc and def)" in refusal(differ, {"train.bin's sha256": "def"})
    assert "dtype (float32 and float16)" in refusal(differ, {"dtype": "float16"})
    assert compared.keys() == {"seed", "dtype", "train.bin's sha256"}


def test_a_first_machine_without_an_address_is_named(monkeypatch):
    asked = []

    def getaddrinfo(host, port):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    processes.check_address("127.0.0.1")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert "MASTER_ADDR=nowhere in the environment has no address" in refusal(processes.check_address, "nowhere")
    assert asked == ["nowhere"] * 2


def test_ctrl_c_ends_a_process_that_waits_for_others():
    """torch waits for a day, and Python's own handler would have to wait for torch."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, meanwhile in ((signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, handler)
            with processes.interruptible():
                assert signal.getsignal(signal.SIGINT) == meanwhile
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("device", "backend", "takes"), [("cuda:1", "nccl", True), ("cuda:1", "gloo", False), ("cpu", "nccl", False)]
)
def test_nccl_is_told_its_gpu(monkeypatch, device, backend, takes):
    """Else it warns at each barrier that it takes the one in use."""
    rt = SimpleNamespace(world_size=2, device=torch.device(device), say=print)
    given = {}
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **kwargs: iter([("store", 0, 2)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda name, store: store)
    monkeypatch.setattr(processes, "meet", lambda *args: "here")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kind, **more: given.update(more, kind=kind))
    processes.meet_all(rt, backend)
    assert given["kind"] == (backend if device != "cpu" else "gloo")
    assert given.get("device_id") == (rt.device if takes else None)
