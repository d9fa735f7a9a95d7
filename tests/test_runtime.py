"""runtime.py: what `auto` chooses on machines that are not here, refusals, peaks by name, memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lib
import train
from lib import runtime
from lib.settings import UserError
from model import GPT, GPTConfig

import pytest
import torch
from conftest import ROOT, refusal
from torch._dynamo.utils import counters

TINY = dict(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


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
    with pytest.raises(UserError, match=says) as error:
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
    with pytest.raises(UserError, match="sees 4 CUDA devices"):
        runtime.choose("cuda")


def test_several_processes_of_a_mac_compute_on_its_cpu(monkeypatch):
    """gloo can't sum what lies on an Apple GPU."""
    pretend(monkeypatch, mps=True)
    for key, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    assert runtime.choose().device.type == "cpu"
    assert "use one, or device=cpu" in refusal(runtime.choose, "mps")


@pytest.mark.parametrize(
    ("training", "dtype", "tf32"), [(True, "float32", True), (True, "auto", False), (False, "float32", False)]
)
def test_tf32_is_for_float32_training(monkeypatch, training, dtype, tf32):
    """The validation loss of a bfloat16 training is that of eval.py, whose logits are in float32."""
    pretend(monkeypatch, ("NVIDIA A100", (8, 0)))
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before, had_cudnn = [switch.allow_tf32 for switch in switches], torch.backends.cuda.cudnn_sdp_enabled()
    try:
        runtime.choose("cuda", dtype, compile=False, training=training)
        assert [switch.allow_tf32 for switch in switches] == [tf32, tf32]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
        torch.backends.cuda.enable_cudnn_sdp(had_cudnn)


def test_a_scheduler_may_show_each_process_one_gpu(monkeypatch):
    """torchrun's processes would all take the same one."""
    pretend(monkeypatch, ("NVIDIA A100", (8, 0)))
    for key, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(key, value)
    assert str(runtime.choose("cuda").device) == "cuda:0"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="sees 1 CUDA devices"):
        runtime.choose("cuda")


def test_attention_has_plans_of_cudnn_in_training_alone(monkeypatch):
    pretend(monkeypatch, ("NVIDIA H100", (9, 0)))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for training in (True, False):
            runtime.choose("cuda", training=training)
            assert torch.backends.cuda.cudnn_sdp_enabled() == training
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0),
        ("GRID A100-10C", 0),
        ("NVIDIA A40-48Q", 0),
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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_layer": 10**6, "n_embd": 10**4}, "take a smaller n_layer, n_embd, n_inner or batch_size"),
        ({"batch_size": 10**9}, "512,000,000,000 tokens in a micro-batch"),
    ],
)
def test_what_can_t_fit_is_refused_before_it_is_built(settings, says):
    s = train.Settings(**{"block_size": 512} | settings)
    shape = GPTConfig(block_size=512, n_layer=s.n_layer, n_head=1, n_embd=s.n_embd)
    assert says in refusal(runtime.check_memory, shape, s, runtime.choose("cpu"))
    runtime.check_memory(GPTConfig(block_size=512), train.Settings(batch_size=1), runtime.choose("cpu"))


def test_no_training_takes_less_than_the_least_memory():
    """Muon keeps one moment of most weights."""
    s, rt = train.Settings(block_size=8, optimizer="muon"), runtime.choose("cpu")
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=1, n_embd=32))
    optimizer, _ = train.make_optimizer(s, model, rt)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
    optimizer.step()
    moments = [m for held in optimizer.state.values() for m in held.values()]
    taken = sum(t.nbytes for p in model.parameters() for t in (p, p.grad)) + sum(m.nbytes for m in moments)
    assert 0.9 * taken < runtime.least_memory(model.config, s, rt, batch_size=0) <= taken


@pytest.mark.parametrize("limit", ["4096\n", "max\n", str(2**62)])
def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch, limit):
    (tmp_path / "limit").write_text(limit)
    monkeypatch.setattr(runtime, "Path", lambda path: tmp_path / "limit")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert runtime.choose("cpu").memory() == (4096 if limit == "4096\n" else pages)


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, spoken in (("0", "a line\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        runtime.choose("cpu").say("a line")
        assert capsys.readouterr().out == spoken


def test_micro_batches_that_can_t_be_shared_out_are_refused_with_the_next_number_that_can(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for processes, batch, micro_batches, more in (
        ("1", 8, 7, None),
        ("4", 8, 8, None),
        ("4", 8, 6, 8),
        ("3", 8, 2, 3),
        ("5", 8, 12, 15),
    ):
        monkeypatch.setenv("WORLD_SIZE", processes)
        rt, s = runtime.choose("cpu"), sizes(batch, micro_batches, auto_batch_size=False)
        if more:
            assert f"--gradient_accumulation_steps={more}" in refusal(rt.check_share, s)
        else:
            rt.check_share(s)


@pytest.mark.parametrize("processes", range(1, 13))
@pytest.mark.parametrize(("batch", "micro_batches"), [(8, 16), (5, 1), (1, 7), (12, 9)])
def test_sequences_that_can_t_be_shared_out_are_refused_with_the_next_number_that_can(
    monkeypatch, processes, batch, micro_batches
):
    """auto_batch_size shares out sequences, and a remedy of many times the batch would be another training."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    rt, s = runtime.choose("cpu"), sizes(batch, micro_batches, auto_batch_size=True)
    fits = next(n for n in range(micro_batches, 1000) if n * batch % processes == 0)
    if fits == micro_batches:
        rt.check_share(s)
    else:
        assert refusal(rt.check_share, s).endswith(f"--gradient_accumulation_steps={fits}")


def sizes(batch, micro_batches, auto_batch_size):
    return SimpleNamespace(batch_size=batch, gradient_accumulation_steps=micro_batches, auto_batch_size=auto_batch_size)


def test_a_container_gets_no_more_threads_than_it_may_use_cores(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit = tmp_path / "cpu.max"
    for text in ("200000 100000\n", "50000 100000\n", "150000 100000\n", "6400000 100000\n", "max 100000\n", "?"):
        limit.write_text(text)
        runtime.limit_threads(limit)
    runtime.limit_threads(tmp_path / "none")
    assert taken == [2, 1, 2, 8]
    limit.write_text("200000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    runtime.limit_threads(limit)
    assert taken == [2, 1, 2, 8]


def test_other_programs_are_seen_where_the_system_counts_them(tmp_path):
    stat = tmp_path / "stat"
    for text, seen in (("cpu 1 2\nprocs_running 1\n", False), ("cpu 1 2\nprocs_running 3\n", True), ("cpu 1\n", False)):
        stat.write_text(text)
        assert lib.others_run(stat) == seen
    assert not lib.others_run(tmp_path / "none")


def test_openmp_s_variable_is_the_user_s_where_it_is_set():
    command = [sys.executable, "-c", "import lib, os; print(os.environ['OMP_WAIT_POLICY'])"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "active"}, capture_output=True, text=True
    )
    assert done.stdout == "active\n"


# ---- compiling ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trial_compiles_what_the_first_step_needs(monkeypatch, dtype):
    compile_it = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, options=None: compile_it(f, dynamic=dynamic, backend="aot_eager")
    )
    torch._dynamo.reset()
    model, rt = GPT(GPTConfig(**TINY)).train(), runtime.choose("cpu", dtype, True, training=True)
    runtime.compile_parts(model, rt, 2, 8)
    graphs = counters["stats"]["unique_graphs"]
    x = torch.randint(TINY["vocab_size"], (2, 8))
    with rt.autocast():
        loss = model(x, x)[1]
    loss.backward()
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_of_the_same_bits_tune_nothing(monkeypatch, deterministic):
    """What is found to be the fastest may differ from run to run."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: given.append(how.get("options")) or f)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    GPT(GPTConfig(**TINY)).compile_parts()
    assert given[0] == {"coordinate_descent_tuning": not deterministic}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no malloc_trim")
def test_memory_that_is_kept_is_given_back_once():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    runtime.keep_freed_memory()
    before = resident()
    numbers = [torch.ones(1 << 20) for _ in range(50)]  # 4 MiB each
    del numbers
    runtime.give_back_freed_memory()
    assert resident() < before + 50e6


def test_a_system_without_these_calls_goes_on_without_them(monkeypatch):
    """Windows takes no None, and a Mac's library has no such names."""
    for answer in (TypeError, OSError, AttributeError):
        monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name, answer=answer: (_ for _ in ()).throw(answer()))
        runtime.keep_freed_memory()
        runtime.give_back_freed_memory()
