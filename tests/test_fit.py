"""auto_batch_size: the size that is chosen, and that the training stays what it is."""

import train as train_py
from lib import fit, resume, runtime
from model import GPT, GPTConfig

import pytest
import torch
from conftest import rows, same_final_weights, weights


@pytest.fixture
def small():
    s = train_py.Settings()
    s.batch_size, s.gradient_accumulation_steps, s.block_size = 3, 8, 8
    s.auto_batch_size = True
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    return model, s, runtime.choose("cpu")


@pytest.mark.parametrize("most", [1, 2, 7, 8, 23, 24, 100])
def test_a_gpu_takes_the_largest_divisor_that_fits(small, monkeypatch, most):
    model, s, rt = small
    tried = []

    def run(model, batch_size, s, rt):
        tried.append(batch_size)
        if batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit, "run", run)
    wanted = max(n for n in (1, 2, 3, 4, 6, 8, 12, 24) if n <= most)
    assert fit.largest(model, [1, 2, 3, 4, 6, 8, 12, 24], s, rt) == wanted == min(tried)


def test_another_error_of_a_trial_is_none_of_memory(small, monkeypatch):
    model, s, rt = small
    monkeypatch.setattr(fit, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit.largest(model, [1, 2], s, rt)


def test_a_size_that_does_not_fit_ends_the_trials_of_the_fastest(small, monkeypatch):
    model, s, rt = small

    def run(model, batch_size, s, rt):
        if batch_size > limit:
            raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(fit, "run", run)
    limit = 4
    assert fit.fastest(model, [1, 2, 4, 8], s, rt) in (1, 2, 4)
    limit = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        fit.fastest(model, [1, 2, 4, 8], s, rt)


def test_a_cpu_takes_the_size_with_the_least_time_a_sequence(small, monkeypatch):
    model, s, rt = small
    now, each = [0.0], {1: 3.0, 2: 2.0, 3: 1.9, 4: 2.05, 6: 2.2, 8: 1.0}  # seconds a sequence
    monkeypatch.setattr(fit.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(fit, "LIMIT", 1000)

    def run(model, batch_size, s, rt):
        now[0] += batch_size * each[batch_size]

    monkeypatch.setattr(fit, "run", run)
    assert fit.fastest(model, [*each], s, rt) == 3  # 8 is never tried: 6 is a tenth slower than 3.
    monkeypatch.setattr(fit, "LIMIT", 8)
    assert fit.fastest(model, [*each], s, rt) == 1


def test_a_trial_leaves_no_gradients_and_the_weights_as_they_are(small):
    model, s, rt = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit.choose_batch_size(model, s, resume.Start(), rt)
    assert s.batch_size * s.gradient_accumulation_steps == 24 and s.batch_size >= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("found", [2, 8])
def test_the_training_is_the_same_and_a_resume_keeps_the_size(train, monkeypatch, found):
    """To the bit with the micro-batches that were found, dropout included."""
    sizes = iter([found, 4])
    monkeypatch.setattr(fit, "fastest", lambda model, all_sizes, s, rt: next(sizes))
    args = "--auto_batch_size=True", "--batch_size=4", "--gradient_accumulation_steps=2"
    status, out, err = train(*args, "--out_dir=out/a", "--max_iters=5", "--lr_decay_iters=12")
    assert status == 0, err
    assert f"batch_size {found}, the fastest tried; micro-batches in a step: {8 // found}" in out
    status, out, err = train(*args, "--out_dir=out/a")
    assert status == 0 and "resuming" in out and "batch_size" not in out, err
    named = f"--batch_size={found}", f"--gradient_accumulation_steps={8 // found}"
    assert train(*named, "--out_dir=out/b", "--lr_decay_iters=12")[0] == 0
    assert same_final_weights("out/a", "out/b")
    assert len(weights("out/a/final.pt")) and rows("out/a")[-1]["tokens"] == 12 * 8 * 16


def test_another_number_of_sequences_is_another_run(train):
    assert train("--out_dir=out/a", "--max_iters=3")[0] == 0
    status, _, err = train("--auto_batch_size=True", "--gradient_accumulation_steps=1", "--out_dir=out/a")
    assert status == 2 and "tokens a step was 128 and is 64" in err


def test_a_run_that_named_its_size_says_that_it_is_chosen_from_now_on(train, monkeypatch):
    monkeypatch.setattr(fit, "fastest", lambda model, sizes, s, rt: 8)
    train("--out_dir=out/a", "--max_iters=4", "--lr_decay_iters=12")
    status, out, err = train("--auto_batch_size=True", "--out_dir=out/a")
    assert status == 0 and "auto_batch_size False -> True" in out and "batch_size 8, the fastest tried" in out, err


def test_what_the_processes_cannot_share_is_refused(train, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    status, _, err = train("--auto_batch_size=True", "--out_dir=out/a")
    assert status == 2 and "not divisible by 3, as 3 processes need; --gradient_accumulation_steps=3" in err
