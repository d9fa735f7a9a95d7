"""What only a CUDA GPU can show: `python -m pytest -m gpu`."""

import gc
import os
import socket
import subprocess
import sys

import train as train_py
from lib import captured, checkpoint, fit, resume, runtime
from model import GPT, ChunkedCrossEntropy, GPTConfig
from muon import orthogonalize

import pytest
import torch
from conftest import ROOT, TINY, rows, same_final_weights
from torch.nn import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def as_before():
    """Training turns TF32 and deterministic kernels on for the whole process."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends], torch.utils.deterministic.fill_uninitialized_memory
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before[0], strict=True):
        backend.allow_tf32 = value
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


# Wide enough for tensor cores, small enough for seconds.
RUN = ["--device=cuda", "--n_embd=128", "--n_head=4", "--max_iters=60", "--learning_rate=3e-3", "--eval_interval=20"]


def losses(out):
    return torch.tensor([r["loss"] for r in rows(out) if "loss" in r])


@pytest.mark.parametrize("compiled", ["False", "True"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_along_float32(train, dtype, compiled):
    """Without dropout, whose masks another kernel draws differently."""
    assert train(*RUN, "--dropout=0", "--dtype=float32", "--out_dir=out/a")[0] == 0
    status, out, err = train(*RUN, "--dropout=0", f"--dtype={dtype}", f"--compile={compiled}", "--out_dir=out/b")
    assert status == 0, err
    full, half = losses("out/a"), losses("out/b")
    assert ("scale" in out) == (dtype == "float16") and "skipped, no." not in out
    # Where the loss falls steeply a small difference shows large; at the end it does not.
    assert full[-1] < full[0] - 1 and abs(full[-20:].mean() - half[-20:].mean()) < 0.05


def test_a_loss_scale_that_is_too_high_skips_steps_and_is_lowered(train, monkeypatch):
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: make(*a, init_scale=2.0**40, **k))
    status, out, err = train(*RUN, "--dtype=float16", "--out_dir=out/a")
    assert status == 0, err
    last = rows("out/a")[-1]
    assert 0 < last["skipped_steps"] < 40 and last["loss_scale"] < 2.0**40
    assert out.count(" skipped, no. ") == last["skipped_steps"] and losses("out/a")[-1] < 4.5
    assert checkpoint.load("out/a/ckpt.pt")["scaler"]["scale"] == last["loss_scale"]


@pytest.mark.parametrize("compiled", ["False", "True"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_deterministic_gives_the_same_bits_and_a_resume_too(train, dtype, optimizer, compiled):
    args = [*RUN, "--deterministic=True", f"--dtype={dtype}", f"--compile={compiled}", "--lr_decay_iters=60"]
    args.append(f"--optimizer={optimizer}")
    for out in ("out/a", "out/b"):
        assert train(*args, f"--out_dir={out}")[0] == 0
    assert same_final_weights("out/a", "out/b") and torch.equal(losses("out/a"), losses("out/b"))
    assert train(*args, "--out_dir=out/c", "--max_iters=20")[0] == 0
    assert train(*args, "--out_dir=out/c")[0] == 0
    assert same_final_weights("out/a", "out/c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_chunked_loss_beside_float64(dtype):
    """Several chunks, ids that are no multiple of 64, targets that don't count."""
    torch.manual_seed(0)
    x = torch.randn(4096, 64, device="cuda")
    w = torch.randn(100_003, 64, device="cuda") * 0.1
    y = torch.randint(100_003, (4096,), device="cuda")
    y[::7] = -1
    exact = [t.double().requires_grad_() for t in (x, w)]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, y, ignore_index=-1)
    wanted.backward()
    ours = [t.clone().requires_grad_() for t in (x, w)]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = ChunkedCrossEntropy.apply(*ours, y)
    (loss * 1024).backward()
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert loss.dtype == torch.float32 and abs(loss.item() - wanted.item()) < close * wanted.item()
    for a, b in zip(ours, exact, strict=True):
        assert ((a.grad / 1024 - b.grad).norm() / b.grad.norm()).item() < close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_sampling_writes_what_uncached_does(dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=128)).cuda().eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=2.0)  # so that greedy text does not repeat itself
    idx = torch.randint(257, (3, 5), device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        cached, plain = (torch.stack(list(model.generate(idx, 100, temperature=0, use_cache=c))) for c in (True, False))
    assert len(plain.unique()) > 20
    # Half precision may decide a near tie otherwise; from there on the texts are others, so only the first ids count.
    n = 100 if dtype == torch.float32 else 3
    assert torch.equal(cached[:n], plain[:n])


def test_saving_goes_on_in_the_background_and_holds_what_it_was_given(tmp_path):
    state = {"model": {"a": torch.ones(1 << 20, device="cuda")}, "model_args": {}}
    state["model"]["b"] = state["model"]["a"]  # tied
    with checkpoint.Writer() as writer:
        writer.write(tmp_path / "x.pt", state)
        state["model"]["a"].zero_()
        (write,) = writer.ended(wait=True)
    loaded = checkpoint.load(tmp_path / "x.pt")["model"]
    assert write.error is None and loaded["a"].sum() == 1 << 20 and loaded["a"].device.type == "cpu"
    assert (tmp_path / "x.pt").stat().st_size < 5 << 20  # stored once


def test_what_cannot_fit_into_the_gpu_s_memory_is_refused(train):
    status, _, err = train(*RUN, "--n_layer=2000", "--n_embd=8192", "--out_dir=out/a")
    assert status == 2 and "take a smaller n_layer" in err and len(err.splitlines()) == 1


def test_running_out_of_the_gpu_s_memory_says_which_batch_trains_the_same(train):
    """Sequences of so many that check_memory's least would fit three times."""
    rt = runtime.choose("cuda", "float32", False)
    batch = 2 * (rt.memory() // 3 // (16 * (16 + 2 * 2 * 128 * 4)) // 2)
    args = "--dtype=float32", "--dropout=0", "--eval_interval=0", f"--batch_size={batch}", "--out_dir=out/a"
    status, _, err = train(*RUN, *args)
    assert status == 2 and "out of memory" in err and f"--batch_size={batch // 2}" in err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_two_gpus_train_as_one_does(train):
    args = [*TINY, *RUN, "--dtype=float32", "--gradient_accumulation_steps=4"]
    assert train(*args, "--out_dir=out/a")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, ROOT / "train.py", *args, "--out_dir=out/b"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    assert (losses("out/a") - losses("out/b")).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(4, 256, 256), (3, 128, 512), (3, 512, 128)])
def test_orthogonalizing_in_bfloat16_is_near_what_float32_gives(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, exact = orthogonalize(x.cuda()).cpu(), orthogonalize(x)
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(1), exact.flatten(1)).min() > 0.99
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize("compiled", ["False", "True"])
def test_recomputed_blocks_take_less_memory_and_train_the_same(train, compiled):
    peaks = []
    for recompute in (False, True):
        gc.collect()  # Other runs of this process may have left graphs.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        args = *RUN, f"--recompute={recompute}", f"--compile={compiled}", "--n_layer=8", "--batch_size=64"
        assert train(*args, f"--out_dir=out/{recompute}")[0] == 0
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.9 * peaks[0]
    torch.testing.assert_close(losses("out/True"), losses("out/False"), atol=0.02, rtol=0)


@pytest.mark.parametrize("dropout", [0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_recorded_micro_batch_trains_as_one_that_is_not_recorded(train, monkeypatch, dtype, dropout):
    args = [*RUN, "--deterministic=True", "--compile=True", f"--dtype={dtype}", f"--dropout={dropout}"]
    status, out, _ = train(*args, "--out_dir=out/a")
    assert status == 0 and "no CUDA graph" not in out
    monkeypatch.setattr(captured, "micro_step", lambda work, *args: work)
    assert train(*args, "--out_dir=out/b")[0] == 0
    assert same_final_weights("out/a", "out/b") and torch.equal(losses("out/a"), losses("out/b"))


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=20, top_p=0.9, eot=7)], ids=str)
def test_captured_sampling_writes_what_the_plain_road_does(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=128)).cuda().eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=2.0)  # so that greedy text does not repeat itself
    prompts = torch.randint(257, (3, 5), device="cuda"), torch.randint(257, (1, 60), device="cuda")

    @torch.inference_mode()
    def written():
        generator = torch.Generator("cuda").manual_seed(1)
        return [torch.stack(list(model.generate(idx, 100, **options, generator=generator))) for idx in prompts]

    plain = written()
    captured.capture(model, torch.float32)
    assert all(map(torch.equal, written(), plain)) and len(plain[0].unique()) > 20


def test_a_killed_run_goes_on_to_the_same_bits(corpus):
    args = [*TINY, *RUN, "--optimizer=muon", "--deterministic=True", "--compile=True", "--max_iters=300"]
    command = [sys.executable, ROOT / "train.py", *args]
    assert subprocess.run([*command, "--out_dir=out/a"], capture_output=True).returncode == 0
    process = subprocess.Popen([*command, "--out_dir=out/b"], stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("step 130/") for line in process.stdout)
    process.kill()
    process.communicate()
    assert 20 <= checkpoint.load("out/b/ckpt.pt")["iter_num"] < 300
    assert subprocess.run([*command, "--out_dir=out/b"], capture_output=True).returncode == 0
    assert same_final_weights("out/a", "out/b")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_on_one_gpu_train_as_one_does(corpus, optimizer):
    """By gloo, since nccl wants a GPU for each."""
    args = [*TINY, *RUN, "--dtype=float32", "--dropout=0", "--backend=gloo", f"--optimizer={optimizer}"]
    command = [sys.executable, ROOT / "train.py", *args]
    assert subprocess.run([*command, "--out_dir=out/a"], capture_output=True).returncode == 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([*command, "--out_dir=out/b"], env=os.environ | group | {"RANK": rank}) for rank in "01"
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert (losses("out/a") - losses("out/b")).abs().max() < 2e-2


def test_attention_drops_the_share_that_it_is_told():
    """With equal weights over equal values, the spread of the sums tells the share."""
    q = torch.zeros(16, 12, 1024, 64, device="cuda", dtype=torch.float16)
    out = F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.1)[..., 0].double()
    ratio = 1024 * (out.var() / out.mean() ** 2).item()
    assert abs(ratio / (1 + ratio) - 0.1) < 0.005 and abs(out.mean().item() - 1) < 0.005


def test_the_largest_micro_batch_that_fits_is_found_where_memory_ends():
    s = train_py.Settings()
    s.batch_size, s.gradient_accumulation_steps, s.block_size = 1, 1 << 15, 64
    s.auto_batch_size = True
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=8, n_head=4, n_embd=256)).cuda()
    rt = runtime.choose("cuda", "bfloat16", False, training=True)
    fit.choose_batch_size(model, s, resume.Start(), rt)
    assert 256 <= s.batch_size < 1 << 15 and s.batch_size * s.gradient_accumulation_steps == 1 << 15
    torch.cuda.reset_peak_memory_stats()
    fit.run(model, s.batch_size, s, rt)
    assert 0.3 * rt.memory() < torch.cuda.max_memory_allocated() < rt.memory()
