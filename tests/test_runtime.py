"""runtime.py: what `auto` chooses on machines that are not here, refusals, peaks by name, stop signals."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import runtime


def pretend(monkeypatch, cuda=None, mps=False):
    """A machine with a GPU of this (name, capability), or with none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if cuda else 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if cuda:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cuda[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cuda[1])


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (("NVIDIA A100-SXM4-80GB", (8, 0)), False, "cuda:0", torch.bfloat16),
        (("NVIDIA GeForce RTX 3090", (8, 6)), True, "cuda:0", torch.bfloat16),
        (("Tesla V100-SXM2-16GB", (7, 0)), False, "cuda:0", torch.float16),
        (("Tesla T4", (7, 5)), False, "cuda:0", torch.float16),
        (None, True, "mps", torch.float32),
        (None, False, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device_and_the_precision_it_has_in_hardware(monkeypatch, cuda, mps, device, dtype):
    pretend(monkeypatch, cuda, mps)
    rt = runtime.choose()
    assert str(rt.device) == device and rt.dtype == dtype
    assert device in rt.why and str(dtype).removeprefix("torch.") in rt.why and "the best device here" in rt.why


def test_what_is_named_is_taken_without_reasons(monkeypatch):
    pretend(monkeypatch, ("NVIDIA A100", (8, 0)))
    rt = runtime.choose("cpu", "float32", False)
    assert (str(rt.device), rt.dtype, rt.compile) == ("cpu", torch.float32, False) and "(" not in rt.why


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"device": "cuda"}, "sees 0 CUDA devices"),
        ({"device": "mps"}, "no Apple GPU"),
        ({"device": "gpu"}, "not a device"),
        ({"device": "meta"}, "not supported"),
        ({"device": "cpu", "dtype": "float16"}, "needs a CUDA GPU"),
    ],
)
def test_what_is_not_here_is_refused(monkeypatch, asked, says):
    pretend(monkeypatch)
    with pytest.raises(runtime.RuntimeChoiceError, match=says) as error:
        runtime.choose(**asked)
    assert "\n" not in str(error.value)


def test_each_local_process_has_a_gpu_of_its_own(monkeypatch):
    pretend(monkeypatch, ("NVIDIA A100", (8, 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for key, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(key, value)
    rt = runtime.choose("cuda")
    assert str(rt.device) == "cuda:2" and (rt.rank, rt.world_size) == (6, 8)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(runtime.RuntimeChoiceError, match="sees 4 CUDA devices"):
        runtime.choose("cuda")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 0),
        ("NVIDIA RTX A4000", 0),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA T400", 0),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 0),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
    ],
)
def test_a_peak_is_known_by_the_whole_name_of_a_card_or_not_at_all(monkeypatch, name, teraflops):
    pretend(monkeypatch, (name, (8, 0)))
    assert runtime.choose().peak_flops() == teraflops * 1e12
    assert runtime.choose(dtype="float32").peak_flops() == 0


def test_running_out_of_memory_is_told_from_other_errors():
    assert runtime.is_out_of_memory(torch.OutOfMemoryError("x")) and runtime.is_out_of_memory(MemoryError())
    assert runtime.is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not runtime.is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_second_signal_stops_at_once_but_not_within_a_second(monkeypatch):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    killed = []
    try:
        stop = runtime.StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the same request, told by somebody else too
        time.sleep(0.01)
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
        monkeypatch.setattr(stop, "at", stop.at - 2)
        stop.receive(signal.SIGINT, None)
        assert killed == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_processes_meet_though_the_store_remembers_those_who_died():
    """Three times three of them, each time with what is left of the meetings before."""
    store, met = torch.distributed.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            # The one who calls the meeting comes last, so that the others find what is left of the one before.
            later = [pool.submit(runtime.meet, store, rank, 3) for rank in (2, 1)]
            time.sleep(0.25)
            names = {pool.submit(runtime.meet, store, 0, 3).result(10), *(f.result(10) for f in later)}
        assert len(names) == 1
        met += names
    assert len(set(met)) == 3
