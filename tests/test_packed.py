"""packed.py: a model for one token at a time on a CPU gives what the plain model gives."""

import threading
import weakref
from types import SimpleNamespace

from lib import packed
from model import MLP

import pytest
import torch
from conftest import random_model
from torch import nn

pytestmark = pytest.mark.skipif(not packed.available(rounds=True), reason="this torch has no oneDNN or no FBGEMM")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def prompts(rows, length=7, seed=1):
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(found, exact):
    """The root mean square of the error, over that of what is exact."""
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_model_gives_the_same_logits_and_text(monkeypatch, capability, rows, bias):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, idx = random_model(bias=bias), prompts(rows)
    nn.init.normal_(model.transformer.wpe.weight, std=2.0)  # The text varies with the position.
    expected, _ = model(idx)
    ids = torch.stack(list(model.generate(idx, 40, temperature=0)))  # beyond the context, which is read again
    assert len(ids.unique()) > 3
    packed.pack(model, rows)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(idx[:1])[0], expected[:1], atol=1e-5, rtol=1e-5)  # another number of rows
    assert torch.equal(torch.stack(list(model.generate(idx, 40, temperature=0))), ids)
    assert not any(isinstance(part, nn.Linear) for part in model.modules())  # No weight is there twice.


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_token_after_others_has_the_hidden_state_that_the_whole_text_gives_it(samples, rounds):
    model, idx = random_model(), prompts(samples, 12)
    expected, c = model.hidden(idx), model.config
    packed.pack(model, samples, rounds)
    cache = torch.zeros(c.n_layer, 2, samples, c.n_head, c.block_size, c.n_embd // c.n_head)
    found = [model.hidden(idx[:, :5], cache)]
    found += [model.hidden(idx[:, i : i + 1], cache, i) for i in range(5, 12)]
    assert relative(torch.cat(found, dim=1), expected) < (2e-3 if rounds else 1e-5)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (7, 8)], ids=str)
def test_a_packed_layer_gives_rows_of_any_number_and_shape(monkeypatch, capability, shape):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    linear, x = nn.Linear(8, 12), torch.randn(1, *shape)
    torch.testing.assert_close(packed.PackedLinear(linear, 1)(x), linear(x))


@pytest.mark.parametrize("rows", [1, 3])
def test_float16_rounds_the_weights_and_nothing_else(rows):
    model, idx = random_model(), prompts(rows)
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and "wte" not in name and "wpe" not in name:
            weight.copy_(weight.half())  # lm_head's is the embedding too, and the embedding is not rounded
    exact = model(idx)[0]
    packed.pack(model, rows, rounds=True)
    assert all(layer.rounds for layer in model.modules() if isinstance(layer, packed.PackedLinear))
    torch.testing.assert_close(model(idx)[0], exact, atol=1e-5, rtol=1e-5)
    model, unrounded = random_model(), random_model()
    packed.pack(model, rows, rounds=True)
    assert 1e-5 < relative(model(idx)[0], unrounded(idx)[0]) < 1e-3  # 2^-12 of a number at most


@pytest.mark.parametrize(
    ("factor", "rounds"), [(1, True), (1e7, False), (-1e7, False), (1e-7, False), (100, True), (0, False)]
)
def test_a_weight_that_float16_cannot_hold_stays_as_it_is(factor, rounds):
    model = random_model()
    expected = model.transformer.h[0].mlp.c_fc
    expected.weight *= factor
    packed.pack(model, 1, rounds=True)
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.rounds == rounds
    for size in (1e-6, 1.0, 1e6):  # activations beyond float16 too, and their products
        x = size * torch.randn(1, 1, expected.in_features, generator=torch.Generator().manual_seed(2))
        assert relative(layer(x), expected(x)) < (5e-4 if rounds else 1e-6)
    assert torch.equal(layer(torch.zeros(1, 1, expected.in_features)), expected.bias[None, None])


@pytest.mark.parametrize(
    ("weight", "fits"), [(7e4, False), (-7e4, False), (6e4, True), (2**-14, True), (2**-16, False)]
)
def test_what_float16_holds_of_a_weight(weight, fits):
    assert packed.fits_half(torch.tensor([[weight, abs(weight) / 2]])) == fits


def test_each_weight_is_freed_before_the_next_is_packed(monkeypatch):
    model, alive = random_model(), []
    weights = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)]

    class Watched(packed.PackedLinear):
        def __init__(self, *args):
            alive.append(sum(weight() is not None for weight in weights))
            super().__init__(*args)

    monkeypatch.setattr(packed, "PackedLinear", Watched)
    packed.pack(model, 1)
    n = len(weights)  # The output layer's, which is the first one, goes on as the embedding.
    assert alive == [n, *range(n, 1, -1)]


@pytest.mark.parametrize("rounds", [False, True])
def test_only_what_packs_in_a_single_thread_is_packed_in_several(monkeypatch, rounds):
    model, idx, threads = random_model(), prompts(1), set()
    exact = model(idx)[0]

    class Watched(packed.PackedLinear):
        def __init__(self, *args):
            threads.add(threading.current_thread() is threading.main_thread())
            super().__init__(*args)

    monkeypatch.setattr(packed, "PackedLinear", Watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    packed.pack(model, 1, rounds)
    assert threads == {not rounds}
    assert relative(model(idx)[0], exact) < (1e-3 if rounds else 1e-6)


def test_what_is_packed_depends_on_what_torch_has(monkeypatch):
    for oneDNN, engine, wanted in (
        (True, "x86", (True, True)),
        (True, "qnnpack", (True, False)),
        (False, "x86", (False, False)),
    ):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda oneDNN=oneDNN: oneDNN)
        monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(engine=engine))
        assert (packed.available(), packed.available(rounds=True)) == wanted


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_blocks_that_somebody_has_changed_write_by_their_own_forward_pass(monkeypatch, block_size, rounds):
    def written(model):
        return torch.stack(list(model.generate(prompts(1), 30, temperature=0))).tolist()

    original = random_model(block_size=block_size)
    packed.pack(original, 1, rounds)
    assert "hidden" in vars(original)  # GPT-2's own blocks take the short way.
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(self.c_fc(x).relu()))
    changed = random_model(block_size=block_size)
    for p in changed.parameters():
        p.copy_(p.half())  # Rounding changes nothing then.
    plain = written(changed)
    packed.pack(changed, 1, rounds)
    assert written(changed) == plain


# ---- the output layer of the likeliest ids ----


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("top", [1, 5, 200, 5000])
@pytest.mark.parametrize("kind", ["random", "alike", "ties", "mixed sizes", "tiny", "zeros"])
def test_the_likeliest_logits_are_exact_and_the_others_lie_below_them(kind, top, size):
    g = torch.Generator().manual_seed(top)
    weight, x = torch.randn(1000, 64, generator=g), size * torch.randn(1, 64, generator=g)
    if kind == "alike":  # so near to each other that float16 can't tell them apart
        weight = weight[:1] + 1e-5 * weight
    elif kind == "ties":
        weight = weight[:10].repeat(100, 1)
    elif kind == "mixed sizes":
        weight *= torch.logspace(-6, 1, 1000)[:, None]
    elif kind == "tiny":
        weight *= 1e-7
    elif kind == "zeros":
        x *= 0
    exact = (x.double() @ weight.double().T)[0]
    logits = packed.LikelyLinear(weight, top)(x)[0]
    wanted = exact.topk(min(top, 1000))
    error = 1e-6 * x.norm() * weight.norm(dim=1).amax()  # Float32 has no more digits.
    assert (logits.topk(min(top, 1000)).values - wanted.values).abs().max() <= error
    # Each id that is taken has the logit that it should have.
    ids = logits.topk(min(top, 1000)).indices
    assert (logits[ids] - exact[ids]).abs().max() <= error


def test_every_rounding_counts_in_what_a_logit_may_be_off():
    """Cases that are near the bound: few channels, a column that all rows share, weights of float16's last digits."""
    g = torch.Generator().manual_seed(0)
    for size, common in ((1e-3, 5.0), (1e-6, 0.0), (1e-6, 1e-3)):
        for C in (1, 2, 3):
            for _ in range(20):
                weight, x = size * torch.randn(300, C, generator=g), torch.randn(1, C, generator=g)
                weight[:, 0] += common
                exact, logits = (x.double() @ weight.double().T)[0], packed.LikelyLinear(weight, 3)(x)[0]
                assert exact[logits.topk(3).indices].min() >= exact.topk(3).values[-1] - 2e-7 * exact.abs().max()
    # The rounding of the input alone puts the second row before the first.
    b = torch.tensor(0.5 + 6 * 2**-11 + 0.98 * 2**-12)
    weight, x = torch.tensor([[-b.half().item() * 1024, 1024], [0.2, 0]]), torch.tensor([[1, b]])
    assert packed.LikelyLinear(weight, 1)(x).argmax() == (x @ weight.T).argmax() == 0
    # The weight's rounding leaves 1024.5 and 1024.5001 of these, which float16 rounds to 1024 and 1025.
    weight, x = torch.tensor([[1024, 0.50022, 0], [1024, 0.5, 1e-4]]), torch.ones(1, 3)
    assert packed.LikelyLinear(weight, 1)(x).argmax() == (x @ weight.T).argmax() == 0


def test_few_logits_are_computed_twice():
    """As many as are wanted, and those within the rounding of the last of them."""
    weight = torch.randn(5000, 256, generator=torch.Generator().manual_seed(0))
    layer, rows = packed.LikelyLinear(weight, 50), []

    class Counted:
        def index_select(self, dim, near):
            rows.append(len(near))
            return weight.index_select(dim, near)

    layer.weight = Counted()
    layer(torch.randn(1, 256, generator=torch.Generator().manual_seed(1)))
    assert 50 <= rows[0] < 75


def test_a_diverged_model_is_seen():
    for bad in (torch.nan, torch.inf):
        x = torch.ones(1, 8)
        x[0, 3] = bad
        assert not packed.LikelyLinear(torch.randn(20, 8), 5)(x).isfinite().all()


@pytest.mark.parametrize(
    ("top", "samples", "rounds", "kind"),
    [
        (12, 1, False, packed.LikelyLinear),
        (13, 1, False, packed.PackedLinear),  # more than a twentieth of 257
        (0, 1, False, packed.PackedLinear),
        (5, 2, False, packed.PackedLinear),
        (5, 1, True, packed.PackedLinear),
    ],
)
def test_the_output_layer_is_of_the_likeliest_where_that_is_faster(top, samples, rounds, kind):
    model = random_model()
    packed.pack(model, samples, rounds, top)
    assert type(model.lm_head) is kind


def test_rows_beyond_the_vocabulary_take_no_place_among_the_likeliest():
    model = random_model(vocab_size=320)
    model.lm_head.weight[257:] *= 50
    x, exact = torch.randn(1, model.config.n_embd), model.lm_head
    wanted = exact(x)[0, :257].topk(5)
    packed.pack(model, 1, top=5, vocab_size=257)
    found = model.lm_head(x)[0]
    assert len(found) == 257 and torch.equal(found.topk(5).indices, wanted.indices)


@pytest.mark.parametrize("rounds", [False, True])
def test_what_follows_a_product_is_gpt_2_s_gelu_or_a_sum(rounds):
    linear, gelu = nn.Linear(64, 32), nn.GELU(approximate="tanh")
    x, other = torch.randn(1, 64), torch.randn(1, 32)
    linear.weight.mul_(0), linear.bias.copy_(torch.linspace(-3, 3, 32))  # no rounding is left
    layer = packed.PackedLinear(linear, 1, rounds)
    torch.testing.assert_close(layer.product(x, "gelu"), gelu(linear(x)), atol=1e-6, rtol=0)
    assert (nn.functional.gelu(linear(x)) - gelu(linear(x))).abs().max() > 1e-4  # The exact GELU is another function.
    torch.testing.assert_close(layer.product(x, "add", other), linear(x) + other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options", [dict(top_k=12), dict(top_k=9, top_p=0.9), dict(temperature=0, top_k=3), dict(top_k=0)], ids=str
)
def test_sampling_draws_the_same_with_it(monkeypatch, options):
    model = random_model(vocab_size=300)
    nn.init.normal_(model.transformer.wpe.weight, std=2.0)
    how = dict(temperature=0.8, vocab_size=257) | options

    def written():
        g = torch.Generator().manual_seed(3)
        return torch.cat(list(model.generate(prompts(1), 40, generator=g, **how))).tolist()

    plain, calls, one_token = written(), [], packed.one_token
    packed.pack(model, 1, top=how["top_k"], vocab_size=257)
    assert isinstance(model.lm_head, packed.LikelyLinear if how["top_k"] else packed.PackedLinear)
    monkeypatch.setattr(packed, "one_token", lambda *args: calls.append(1) or one_token(*args))
    assert written() == plain and len(set(plain)) > 1
    assert len(calls) > 20  # The others read a prompt, or the newest half of a full context.


def test_an_output_layer_that_float16_cannot_hold_is_packed_whole():
    model = random_model()
    model.lm_head.weight *= 1e5
    packed.pack(model, 1, top=5)
    assert isinstance(model.lm_head, packed.PackedLinear)
