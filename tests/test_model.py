"""The model against transformers' GPT-2, slow exact references, and properties."""

import math
import subprocess
import sys
import time
from dataclasses import replace

import model
from lib.assemble import assemble
from lib.huggingface import CONV1D
from model import GPT, ChunkedCrossEntropy, GPTConfig, draw

import pytest
import torch
from conftest import ROOT, same_bits, save_huggingface
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

SMALL = dict(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
SHAPES = [
    SMALL,
    SMALL | dict(n_head=1, vocab_size=64),
    SMALL | dict(n_head=8, n_inner=24),
    SMALL | dict(n_layer=1, n_head=4, n_inner=7, vocab_size=131),
    SMALL | dict(n_layer=3, n_embd=24, n_head=3, vocab_size=128),
]


def show(shape):
    return "-".join(str(v) for k, v in shape.items() if SMALL.get(k) != v) or "small"


def build(seed=0, **shape):
    """A GPT in eval mode, every parameter, biases and norms too, moved away from where it starts.

    The positions are moved most, so that greedy text varies.
    """
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**SMALL | shape)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.8 if "wpe" in name else 0.2)
    return net


def ids(net, B, T, seed=1):
    return torch.randint(net.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def generator(seed=2):
    return torch.Generator().manual_seed(seed)


def transformers_model(net, folder):
    folder = save_huggingface(net, folder)
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return theirs.eval()


# ---- transformers ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=show)
def test_logits_loss_and_gradients_are_those_of_transformers(shape, bias, tmp_path):
    ours = build(**shape, bias=bias)
    theirs = transformers_model(ours, tmp_path)
    idx = ids(ours, 3, 12)
    labels = idx.clone()
    labels[0, 5:9] = labels[2, 1] = -1

    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4

    loss = ours(idx[:, :-1], labels[:, 1:].contiguous())[1]
    # transformers shifts the labels itself, and ignores -100.
    reference = theirs(input_ids=idx, labels=labels.masked_fill(labels < 0, -100)).loss
    assert abs(loss - reference) < 1e-4

    loss.backward()
    reference.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        # OpenAI's Conv1D keeps a linear layer's weight transposed.
        grad = wanted[name].T if ".c_" in name and p.dim() == 2 else wanted[name]
        assert grad.abs().max() > 1e-3, name  # Else the next line would show nothing.
        assert (p.grad - grad).abs().max() < 1e-4, name


def test_norms_of_small_activations_are_those_of_transformers(tmp_path):
    """Where the activations are as small as the norms' eps, it shows."""
    ours = build()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight")) or ".c_proj." in name:
                p *= 3e-3
    theirs = transformers_model(ours, tmp_path)
    idx = ids(ours, 3, 12)
    with torch.no_grad():
        assert (ours.hidden(idx) - theirs.transformer(idx).last_hidden_state).abs().max() < 1e-4


def test_greedy_text_is_that_of_transformers(tmp_path):
    ours = build(block_size=24)
    theirs = transformers_model(ours, tmp_path)
    idx = ids(ours, 3, 4)
    expected = theirs.generate(idx, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 4:]
    assert len(expected.unique()) > 3  # The text varies.
    assert torch.equal(text(ours, idx, 20, temperature=0), expected)


# ---- shape, names, initial weights ----


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_those_of_nanogpt(bias):
    V, T, C, inner = 50, 12, 16, 24
    wanted = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "lm_head.weight": (V, C)}
    for i in range(2):
        block = f"transformer.h.{i}"
        wanted |= {f"{block}.{norm}.weight": (C,) for norm in ("ln_1", "ln_2")}
        wanted |= {f"{block}.attn.c_attn.weight": (3 * C, C), f"{block}.attn.c_proj.weight": (C, C)}
        wanted |= {f"{block}.mlp.c_fc.weight": (inner, C), f"{block}.mlp.c_proj.weight": (C, inner)}
    wanted["transformer.ln_f.weight"] = (C,)
    if bias:
        without = ("wte", "wpe", "lm_head")
        wanted |= {k[:-6] + "bias": v[:1] for k, v in wanted.items() if not k.removesuffix(".weight").endswith(without)}
    state = build(bias=bias, n_inner=inner).state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == wanted


@pytest.mark.parametrize(
    "shape",
    [
        *({name: value} for name in SMALL for value in (0, -1)),
        dict(n_head=3),
        dict(n_head=32),
        dict(n_inner=-1),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_built_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=next(iter(shape))):
        GPTConfig(**SMALL | shape)


def test_gpt2_has_the_published_number_of_parameters_and_operations():
    with torch.device("meta"):
        net = GPT(GPTConfig())
    assert net.num_params() + 1024 * 768 == 124_439_808
    assert net.num_params() + 1024 * 768 == sum(p.numel() for p in net.parameters())
    assert net.flops_per_token() == pytest.approx(0.855e9, rel=1e-3)


def test_a_model_without_memory_is_made_without_a_second_of_imports():
    program = """
import sys, torch
from model import GPT, GPTConfig
before = len(sys.modules)
with torch.device("meta"):
    net = GPT(GPTConfig())
assert net.lm_head.weight is net.transformer.wte.weight and net.lm_head.weight.is_meta
assert len(sys.modules) - before < 50, len(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_operations_are_those_of_the_matrices_and_of_attention():
    """A multiply-add is 2 operations. The forward pass does each once, the backward pass twice."""
    net = build(n_inner=24, bias=False)
    matrices = sum(p.numel() for name, p in net.named_parameters() if "wpe" not in name)
    T, C, layers = 12, 16, 2
    assert net.flops_per_token() == 3 * (2 * matrices + layers * (2 * T * C + 2 * T * C))


def test_the_output_layer_is_the_embedding():
    net = build()
    assert net.lm_head.weight is net.transformer.wte.weight
    assert len([name for name, _ in net.named_parameters() if name.endswith(("wte.weight", "lm_head.weight"))]) == 1
    net.load_state_dict(build(seed=5).state_dict())
    assert net.lm_head.weight is net.transformer.wte.weight


def test_initial_weights_have_gpt2s_deviations():
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=128, vocab_size=200, n_layer=8, n_head=2, n_embd=64))
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            n = p.numel()
            # The bounds are five standard errors of a mean and of a deviation.
            assert abs(p.mean()) < 5 * std / math.sqrt(n), name
            assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * n), name


def test_only_matrices_decay_and_each_parameter_is_there_once():
    net = build()
    decays, rest = net.optim_groups(0.1)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in net.named_parameters()}
    assert sorted(names[p] for g in (decays, rest) for p in g["params"]) == sorted(names.values())
    for p in decays["params"]:
        assert names[p].endswith(("wte.weight", "wpe.weight", *CONV1D))
    for p in rest["params"]:
        assert names[p].endswith("bias") or "ln_" in names[p]


def test_cropped_positions_leave_short_inputs_as_they_were():
    net = build()
    before = net.config
    idx = ids(net, 2, 5)
    wanted, weight = net(idx)[0], net.transformer.wpe.weight
    net.crop_block_size(5)
    assert torch.equal(net(idx)[0], wanted)
    assert (net.config.block_size, before.block_size) == (5, 12)
    assert torch.equal(net.state_dict()["transformer.wpe.weight"], weight[:5])
    assert net.transformer.wpe.weight.untyped_storage().nbytes() == 5 * 16 * 4  # The others' memory is free.
    with pytest.raises(ValueError, match="6 positions do not fit in block_size=5"):
        net(ids(net, 2, 6))
    net(idx, idx)[1].backward()
    assert net.transformer.wpe.weight.grad.abs().sum() > 0  # The positions still learn.


def test_dropout_reaches_every_branch_attention_too(monkeypatch):
    net = build().train()
    idx = ids(net, 2, 12)
    wanted = net(idx)[0]
    assert torch.equal(net(idx)[0], wanted)  # no dropout at first
    net.set_dropout(0.5)
    assert net.config.dropout == 0.5
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            x = torch.ones(10_000)
            assert abs((module(x) == 0).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(10_000)
    with monkeypatch.context() as patch:  # Only the attention's own dropout is left.
        patch.setattr(nn.Dropout, "forward", lambda self, x: x)
        assert not torch.allclose(net(idx)[0], wanted, atol=1e-2)
    assert torch.allclose(net.eval()(idx)[0], wanted, atol=1e-6)
    net.train().set_dropout(0.0)
    assert torch.equal(net(idx)[0], wanted)


def test_dropout_sets_elements_of_the_embeddings_and_of_each_branch_to_0():
    net, seen = build(dropout=0.5).train(), []
    net.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for block in net.transformer.h:
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(lambda module, args, out: seen.append(out))
    net(ids(net, 2, 12))
    assert len(seen) == 5
    for x in seen:
        assert abs((x == 0).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(x.numel())


def test_logits_depend_on_what_came_before_and_on_nothing_after():
    net = build()
    kept = []

    def keep(module, args, embedding):
        kept.append(embedding.detach().requires_grad_())
        return kept[-1]

    net.transformer.wte.register_forward_hook(keep)
    logits = net(ids(net, 2, 6))[0]
    direction = torch.randn(logits.size(-1), generator=generator())
    for t in range(6):
        (grad,) = torch.autograd.grad((logits[:, t] @ direction).sum(), kept[0], retain_graph=True)
        assert not grad[:, t + 1 :].any()
        assert (grad[:, : t + 1].abs().sum(dim=2) > 0).all()


# ---- a model of given weights ----


def test_a_state_dict_becomes_a_model_to_the_bit():
    net = build(n_inner=24)
    again = assemble(net.config, net.state_dict())
    assert again.config == net.config
    assert same_bits(again.state_dict(), net.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight
    assert all(p.requires_grad for p in again.parameters())


def test_a_state_dict_may_leave_out_the_tied_output_layer():
    net = build()
    state = net.state_dict()
    del state["lm_head.weight"]
    again = assemble(net.config, state)
    assert same_bits(again.state_dict(), net.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight
    assert "lm_head.weight" not in state  # The caller's dict stays as it was.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(dtype):
    net = build()
    state = {name: p.to(dtype) for name, p in net.state_dict().items()}
    again = assemble(net.config, state).state_dict()
    assert {p.dtype for p in again.values()} == {torch.float32}
    assert same_bits(again, {name: p.float() for name, p in state.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"transformer.h.1.ln_2.bias": torch.zeros(16, dtype=torch.int64)}, r"transformer.h.1.ln_2.bias .*int64"),
        ({"transformer.wpe.weight": torch.zeros(12, 16).to_sparse()}, r"transformer.wpe.weight .*sparse"),
        ({"transformer.wpe.weight": [0.0]}, r"transformer.wpe.weight is no tensor"),
        ({"transformer.wpe.weight": None}, r"transformer.wpe.weight is no tensor"),
        ({"transformer.wpe.weight": torch.zeros(13, 16)}, r"transformer.wpe.weight is \(13, 16\), .* \(12, 16\)"),
        ({"lm_head.weight": torch.zeros(50, 16)}, r"lm_head.weight is not transformer.wte.weight"),
        ({"lm_head.weight": torch.zeros(51, 16)}, r"lm_head.weight is \(51, 16\)"),
        ({"score.weight": torch.zeros(2, 16)}, r"score.weight .* no weight of GPT-2"),
        ({"transformer.h.2.ln_1.weight": torch.zeros(16)}, r"n_layer=2, .* 3 blocks"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, says):
    net = build()
    with pytest.raises(ValueError, match=says):
        assemble(net.config, net.state_dict() | change)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.ln_2.bias"])
def test_an_absent_weight_is_refused_by_name(name):
    net = build()
    state = {k: v for k, v in net.state_dict().items() if k not in (name, "lm_head.weight")}
    with pytest.raises(ValueError, match=f"{name} is no tensor"):
        assemble(net.config, state)


@pytest.mark.parametrize("size", [dict(n_layer=10**6), dict(n_inner=10**9), dict(vocab_size=10**9), dict(n_embd=2**40)])
def test_a_size_that_the_weights_do_not_have_is_refused_before_anything_is_built(size):
    net = build()
    began = time.perf_counter()
    with pytest.raises(ValueError):
        assemble(replace(net.config, **size), net.state_dict())
    assert time.perf_counter() - began < 1


# ---- the loss ----


def loss_case(N=9, C=8, V=70):
    """x (N, C), weight (V, C), targets (N,) of which some at both ends and inside are ignored."""
    torch.manual_seed(3)
    targets = torch.randint(V, (N,))
    targets[[0, 4, -1]] = -1
    targets[1] = V - 1
    return torch.randn(N, C), torch.randn(V, C), targets


def value_and_gradients(loss, *inputs):
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs)


def exact_loss(x, weight, targets):
    """The loss and both gradients by F.cross_entropy in float64."""
    return value_and_gradients(
        lambda x, w: F.cross_entropy(x @ w.T, targets, ignore_index=-1), x.double(), weight.double()
    )


@pytest.mark.parametrize("fused", [None, model.softmax_])
@pytest.mark.parametrize("V", [64, 70])
@pytest.mark.parametrize("rows", [1, 4, 7, 9, 10])
def test_the_chunked_loss_is_exact_in_float32(rows, V, fused, monkeypatch):
    monkeypatch.setattr(model, "chunk_rows", lambda positions, weight, fused: rows)
    x, weight, targets = loss_case(V=V)
    got = value_and_gradients(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets, fused), x, weight)
    for mine, exact in zip(got, exact_loss(x, weight, targets), strict=True):
        assert mine.dtype == torch.float32
        # These are sums of at most 70 terms of a few units, with some tens of roundings of 6e-8.
        assert (mine - exact).abs().max() < 1e-5


@pytest.mark.parametrize("fused", [None, model.softmax_])
@pytest.mark.parametrize("V", [64, 70])
@pytest.mark.parametrize("rows", [1, 4, 7, 9, 10])
def test_the_chunked_loss_under_autocast_differs_by_bfloat16s_roundings(rows, V, fused, monkeypatch):
    monkeypatch.setattr(model, "chunk_rows", lambda positions, weight, fused: rows)
    x, weight, targets = loss_case(V=V)
    x, weight = x.bfloat16().float(), weight.bfloat16().float()  # The inputs themselves lose nothing by bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets, fused), x, weight)
    exact = exact_loss(x, weight, targets)
    assert [z.dtype for z in got] == [torch.float32] * 3
    # bfloat16 rounds to 2**-9 of a number. A loss moves by no more than twice what the logits do (log-sum-exp is
    # 1-Lipschitz), and it is taken in float32, which adds nothing that shows.
    logit_error = (x @ weight.T).abs().max() * 2**-9
    assert abs(got[0] - exact[0]) < 2 * logit_error
    # The logits' errors change a probability p by a factor exp(2 * logit_error). p - 1 or p, the product and its part
    # of a sum are rounded once each. This bounds the error of a whole gradient.
    bound = math.expm1(2 * logit_error) + 3 * 2**-9
    for mine, wanted in zip(got[1:], exact[1:], strict=True):
        assert (mine - wanted).norm() < bound * wanted.norm()


def test_the_loss_of_bfloat16_logits_is_taken_in_float32():
    x, weight, targets = loss_case()
    x, weight = (4 * x).round() / 4, (4 * weight).round() / 4  # Sums of products are exact, then rounded once.
    logits = (x @ weight.T).bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ChunkedCrossEntropy.apply(x, weight, targets)
    assert abs(loss - F.cross_entropy(logits, targets, ignore_index=-1)) < 1e-5


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_loss_and_its_gradients_do_not_depend_on_the_chunks(autocast, monkeypatch):
    """Each position is computed alone but for sums in float32. One row and all rows differ by their roundings."""
    x, weight, targets = loss_case()
    got = []
    for rows in (1, 9):
        monkeypatch.setattr(model, "chunk_rows", lambda positions, weight, fused, rows=rows: rows)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            got.append(value_and_gradients(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets), x, weight))
    for one, whole in zip(*got, strict=True):
        assert (one - whole).abs().max() < (1e-6 if autocast is None else 2**-8 * whole.abs().max())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_loss_scale_scales_the_gradients_exactly(autocast):
    """A power of two shifts exponents and rounds nothing."""
    x, weight, targets = loss_case()

    def gradients(scale):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return value_and_gradients(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets) * scale, x, weight)[1:]

    for one, scaled in zip(gradients(1), gradients(2.0**16), strict=True):
        assert torch.equal(one * 2.0**16, scaled)


def test_a_loss_scale_overflows_no_half_precision_intermediate():
    """float16 ends at 65,504. With few targets the scaled gradients of the hidden states lie beyond it."""
    x, weight, targets = loss_case()
    targets[2:] = -1  # One target is left.
    with torch.autocast("cpu", torch.float16):
        _, grad_x, grad_w = value_and_gradients(
            lambda x, w: ChunkedCrossEntropy.apply(x, w, targets) * 2.0**16, x, weight
        )
    _, exact_x, exact_w = exact_loss(x.half().float(), weight.half().float(), targets)
    assert (exact_x * 2.0**16).abs().max() > 65504  # The case is the one that is meant.
    # float16 rounds to 2**-12 of a number. There are as many roundings as with bfloat16 above.
    assert (grad_x / 2.0**16 - exact_x).norm() < 2**-7 * exact_x.norm()
    assert (grad_w / 2.0**16 - exact_w).norm() < 2**-7 * exact_w.norm()


def test_gradients_of_many_targets_do_not_sink_below_float16():
    """The mean divides by N. It must do so in float32, or small gradients lose their digits."""
    N, C, V = 4096, 2, 4
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C), 0.001 * torch.randn(V, C), torch.randint(V, (N,))
    weight = weight.half().float()
    with torch.autocast("cpu", torch.float16):
        _, grad_x, _ = value_and_gradients(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets), x, weight)
    _, exact_x, _ = exact_loss(x.half().float(), weight, targets)
    assert (grad_x - exact_x).norm() < 2**-9 * exact_x.norm()


def test_a_loss_scale_scales_the_models_gradients_exactly():
    net = build()
    idx = ids(net, 3, 13)

    def gradients(scale):
        loss = net(idx[:, :-1], idx[:, 1:])[1] * scale
        return torch.autograd.grad(loss, [*net.parameters()])

    for one, scaled in zip(gradients(1), gradients(2.0**16), strict=True):
        assert torch.equal(one * 2.0**16, scaled)


def test_a_loss_without_a_target_is_no_number_as_in_torch():
    x, weight, targets = loss_case()
    assert ChunkedCrossEntropy.apply(x, weight, targets.fill_(-1)).isnan()
    assert F.cross_entropy(x @ weight.T, targets, ignore_index=-1).isnan()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("vocab_size", [10, 50257, 10**8])
@pytest.mark.parametrize("positions", [1, 64, 5000, 16384, 10**6])
def test_chunks_are_equal_and_hold_few_logits(positions, vocab_size, device, fused):
    weight = torch.empty(1, device=device).expand(vocab_size, 1)
    rows = model.chunk_rows(positions, weight, fused)
    assert type(rows) is int and 0 < rows <= positions
    # No more than are needed, so the last chunk lacks less than 64 rows for each chunk.
    chunks = -(-positions // rows)
    assert chunks * rows - positions < 64 * chunks
    limit = 80e6 if device == "cpu" else 2**31 if fused else 2**29  # bytes
    assert rows <= 64 or rows * vocab_size * 4 <= limit + 63 * vocab_size * 4


def test_scores_have_float32_logits_under_autocast_too():
    x, weight, targets = loss_case()
    exact = model.chunked_nll(x, weight, targets.clamp(min=0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.chunked_nll(x, weight, targets.clamp(min=0)), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_hand_on_bfloat16_in_training_and_float32_elsewhere(dtype, training):
    net, kinds = build().train(training), []
    for block in net.transformer.h:
        block.register_forward_hook(lambda _, inputs, output: kinds.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        net.hidden(ids(net, 2, 8))
    wanted = torch.bfloat16 if training and dtype == torch.bfloat16 else torch.float32
    assert kinds == [(wanted, wanted)] * len(net.transformer.h)


@pytest.mark.parametrize("V", [64, 70])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_nll_is_the_loss_of_each_scored_target_in_their_order(rows, V, monkeypatch):
    monkeypatch.setattr(model, "chunk_rows", lambda positions, weight, fused: rows)
    net = build(vocab_size=V)
    idx, targets = ids(net, 3, 12), ids(net, 3, 12, seed=4)
    targets[0, :5] = targets[1, 3] = targets[2, 7:] = -1
    wanted = F.cross_entropy(net(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    got = net.nll(idx, targets)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert got.shape == (3 * 12 - 5 - 1 - 5,)
    assert torch.allclose(got, wanted[targets.flatten() >= 0], atol=1e-5)
    assert torch.allclose(got.mean(), net(idx, targets)[1], atol=1e-5)
    assert net.nll(idx, torch.full_like(targets, -1)).shape == (0,)


def saved_bytes(net, idx, targets):
    """(gradients of a training step, bytes that the forward pass keeps for the backward pass)."""
    kept = []
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        torch.manual_seed(5)
        _, loss = net(idx, targets)
    loss.backward()
    return [p.grad.clone() for p in net.parameters()], sum(kept)


def test_recomputed_blocks_keep_less_and_give_the_same_gradients_to_the_bit():
    net = build(n_layer=4, dropout=0.3).train()
    idx = ids(net, 3, 12)
    plain, much = saved_bytes(net, idx, idx)
    net.recompute = True
    again, little = saved_bytes(net, idx, idx)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < 0.5 * much


# ---- generation ----


def text(net, idx, n, **options):
    """The n ids after each prompt, (B, n)."""
    return torch.stack(list(net.generate(idx, n, **options)), dim=1)


@pytest.mark.parametrize("prompt", [1, 4, 13])
@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=1.3, top_k=20, top_p=0.9)], ids=["0", "1.3"])
def test_the_cache_changes_no_token(options, block_size, prompt):
    net = build(block_size=block_size)
    idx = ids(net, 3, prompt)
    slow = text(net, idx, 25, **options, use_cache=False, generator=generator())
    assert torch.equal(text(net, idx, 25, **options, generator=generator()), slow)


@pytest.mark.parametrize("prompt", [1, 5, 13])
@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
def test_a_full_context_goes_on_from_its_newest_half(block_size, prompt):
    net = build(block_size=block_size)
    idx = ids(net, 3, prompt)
    context, wanted = idx[:, -block_size:], []
    for _ in range(20):
        if context.size(1) > block_size:
            context = context[:, -max(1, block_size // 2) :]
        wanted.append(net(context)[0][:, -1].argmax(dim=1))
        context = torch.cat([context, wanted[-1][:, None]], dim=1)
    assert torch.equal(text(net, idx, 20, temperature=0), torch.stack(wanted, dim=1))


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=1),
        dict(top_p=1e-6),
        dict(top_p=0.0),
        dict(temperature=1e-6),
        dict(temperature=1e-50),
        dict(top_k=1, top_p=0.5),
    ],
    ids=str,
)
def test_the_narrowest_choice_is_the_greedy_one(options):
    net = build()
    idx = ids(net, 4, 3)
    assert torch.equal(text(net, idx, 20, **options), text(net, idx, 20, temperature=0))


def test_a_temperature_that_overflows_float32_is_greedy_too():
    logits = torch.tensor([[-120.0, -100.0, -101.0], [-90.0, -100.0, -110.0]])  # logits as large as GPT-2's
    assert draw(logits, 1e-37, 0, 1.0).tolist() == [1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_said(value):
    net = build()
    net.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([3]), value))
    with pytest.raises(ValueError, match="not finite"):
        text(net, ids(net, 2, 3), 1)


def test_prompts_of_a_batch_do_not_see_each_other():
    net = build()
    idx = ids(net, 4, 3)
    each = torch.cat([text(net, row[None], 20, temperature=0) for row in idx])
    assert torch.equal(text(net, idx, 20, temperature=0), each)


def test_a_seed_gives_the_same_text_and_another_one_another():
    net = build()
    idx = ids(net, 2, 3)
    first = text(net, idx, 20, generator=generator(1))
    assert torch.equal(text(net, idx, 20, generator=generator(1)), first)
    assert not torch.equal(text(net, idx, 20, generator=generator(2)), first)


def test_generation_keeps_no_graph_and_leaves_gradients_on():
    net, graphs = build(), []
    net.lm_head.register_forward_hook(lambda module, args, logits: graphs.append(logits.requires_grad))
    for drawn in net.generate(ids(net, 2, 3), 3):
        assert drawn.shape == (2,)
        assert drawn.dtype == torch.int64
        assert torch.is_grad_enabled()
    assert graphs == [False] * 3
    assert list(net.generate(ids(net, 2, 3), 0)) == []


def test_a_finished_sample_goes_on_with_eot_and_generation_ends_when_all_have():
    net = build(vocab_size=6)
    idx, eot = ids(net, 4, 3), 5
    free = text(net, idx, 300, generator=generator())
    got = text(net, idx, 300, generator=generator(), eot=eot)
    ends = [row.tolist().index(eot) for row in free]
    assert len(set(ends)) > 1  # The case is the one that is meant.
    assert got.size(1) == max(ends) + 1
    for row, without, end in zip(got, free, ends, strict=True):
        assert torch.equal(row[:end], without[:end])
        assert (row[end:] == eot).all()


def test_a_prompt_that_holds_eot_is_not_finished():
    net = build()
    idx = ids(net, 2, 3)
    eot = int(idx[0, -1])
    wanted = text(net, idx, 8, temperature=0)
    assert eot not in wanted  # The case is the one that is meant.
    assert torch.equal(text(net, idx, 8, temperature=0, eot=eot), wanted)


def test_ids_beyond_vocab_size_are_never_drawn():
    net = build()
    idx = ids(net, 8, 3)
    drawn = text(net, idx, 50, temperature=10.0, vocab_size=7, generator=generator())
    assert sorted(drawn.unique().tolist()) == list(range(7))
    assert text(net, idx, 50, temperature=10.0, generator=generator()).max() >= 7
    likeliest = next(net.generate(idx, 1, temperature=0, vocab_size=7))
    assert torch.equal(likeliest, net(idx)[0][:, -1, :7].argmax(dim=1))


def exact_distribution(logits, temperature, top_k, top_p):
    """The probability of each id, in Python floats."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    mass = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, kept, before = sum(mass), [], 0.0
    for m in mass:
        if kept and before / total >= top_p:
            break
        kept.append(m)
        before += m
    probs = dict(zip(order, (m / sum(kept) for m in kept), strict=False))
    return [probs.get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3, 0.0])
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    n, logits = 20_000, torch.randn(8, generator=generator(7)) * 1.5
    drawn = draw(logits.expand(n, 8), temperature, top_k, top_p, generator())
    counts = torch.bincount(drawn, minlength=8).tolist()
    # A probability of 0 or 1 allows no deviation at all.
    for count, p in zip(counts, exact_distribution(logits.tolist(), temperature, top_k, top_p), strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)), (count, n * p)


def test_each_row_of_logits_is_drawn_from_by_itself():
    logits = torch.full((5, 5), -1e9).fill_diagonal_(0.0).roll(2, dims=1)
    for temperature in (0, 1.0):
        for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
            assert draw(logits, temperature, top_k, top_p).tolist() == [2, 3, 4, 0, 1]
