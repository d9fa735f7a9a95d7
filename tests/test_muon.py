"""Muon against the singular value decomposition, its definition written out, and torch's AdamW."""

import muon
from model import GPT, GPTConfig
from muon import Muon, orthogonalize

import pytest
import torch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7), (96, 384)])
def test_orthogonalize_keeps_the_singular_vectors_and_sets_the_values_near_1(shape):
    x = randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]  # any scale
    found = orthogonalize(x)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ found @ vt.mT  # diagonal, if the vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    well = s / x.norm(dim=(1, 2))[:, None] > 1e-3  # what the five steps can raise
    assert well.float().mean() > 0.9
    assert values[well].min() > 0.65 and values[well].max() < 1.2
    torch.testing.assert_close(found - u @ inner @ vt, torch.zeros_like(found), atol=1e-3, rtol=0)  # nothing else


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_orthogonalize_applies_the_published_quintic_five_times(shape):
    x = randn(2, *shape).double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(x), u * s[:, None] @ vt, atol=1e-5, rtol=0)


def test_a_batch_is_each_of_its_matrices_by_itself_and_zeros_stay_zeros():
    x = randn(4, 12, 20)
    each = torch.cat([orthogonalize(m[None]) for m in x])
    torch.testing.assert_close(orthogonalize(x), each, atol=1e-5, rtol=1e-4)
    assert orthogonalize(torch.zeros(1, 3, 5)).abs().max() == 0


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_share_the_matrices_and_have_the_bits_of_one(monkeypatch, processes, count):
    x, shares = randn(count, 16, 40), {}
    monkeypatch.setattr(muon.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.distributed, "get_world_size", lambda: processes)

    def gather(together, own):
        shares[rank] = own
        if len(shares) == processes:
            for part, share in zip(together, shares.values(), strict=True):
                part.copy_(share)

    monkeypatch.setattr(muon.distributed, "all_gather", gather)
    for rank in range(processes):
        monkeypatch.setattr(muon.distributed, "get_rank", lambda rank=rank: rank)
        found = muon.orthogonalize_together(x)
    assert torch.equal(found, orthogonalize(x))
    assert {len(own) for own in shares.values()} == {-(-count // processes)}


def test_steps_are_those_of_the_definition():
    """Momentum, look ahead, equal rows, the scale and the decoupled decay, in float64 for one matrix at a time."""
    lr, decay, shapes = 0.02, 0.3, [(8, 8), (8, 20), (20, 8), (8, 8)]
    params = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    expected = [p.detach().double().clone() for p in params]
    means = [torch.zeros_like(p) for p in expected]
    optimizer = Muon([{"params": params, "weight_decay": decay, "muon": True}], lr=lr, betas=(0.9, 0.95))
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * step + i)
            means[i] = 0.95 * means[i] + 0.05 * p.grad.double()
            ahead = 0.05 * p.grad.double() + 0.95 * means[i]
            direction = orthogonalize((ahead / ahead.norm(dim=1)[:, None])[None])[0]
            expected[i] = (1 - lr * decay) * expected[i] - lr * 0.2 * max(p.shape) ** 0.5 * direction
        optimizer.step()
    for p, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_a_block_s_matrix_is_trained_by_adamw_to_the_bit(fused):
    def build():
        torch.manual_seed(0)
        return GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=16))

    ours, theirs = build(), build()
    muon = Muon(ours.optim_groups(0.1, muon=True), lr=1e-2, betas=(0.9, 0.95), fused=fused)
    adamw = torch.optim.AdamW(theirs.optim_groups(0.1), lr=1e-2, betas=(0.9, 0.95), fused=fused, foreach=False)
    inside = {n for n, p in ours.named_parameters() if p.dim() == 2 and n.startswith("transformer.h.")}
    assert len(inside) == 8
    for step in range(3):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            p.grad = randn(*p.shape, seed=97 * step + len(name))
            q.grad = p.grad.clone()
        muon.step()
        adamw.step()
    same = {n: torch.equal(p, q) for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True)}
    assert {n for n, equal in same.items() if not equal} == inside


def test_the_scale_of_a_row_s_gradient_does_not_matter_and_a_row_without_one_stays():
    def step(scales):
        p = torch.nn.Parameter(torch.zeros(6, 10))
        p.grad = randn(6, 10) * torch.tensor(scales)[:, None]
        Muon([{"params": [p], "muon": True}], lr=0.1, betas=(0.9, 0.95)).step()
        return p.detach()

    torch.testing.assert_close(step([1e-4, 1, 1, 1e4, 1, 1]), step([1.0] * 6), atol=1e-6, rtol=1e-3)
    assert step([1, 1, 0, 1, 1, 1])[2].abs().max() == 0


def test_a_parameter_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(3, 3)) for _ in "pq")
    p.grad = torch.eye(3)
    Muon([{"params": [p, q], "muon": True}], lr=0.1, betas=(0.9, 0.95)).step()
    assert torch.equal(q.detach(), torch.ones(3, 3)) and not torch.equal(p.detach(), torch.ones(3, 3))
