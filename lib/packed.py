"""One token at a time on a CPU. Reading the weights takes the time there. So they are read fast, or they are rounded.

Between the products lie as few operations as can be, since each of them finds its data gone from the caches.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


def available(rounds=False):
    """Whether torch has what pack() needs on this processor: oneDNN, and FBGEMM where weights are rounded."""
    return torch.backends.mkldnn.is_available() and (not rounds or torch.backends.quantized.engine in ("x86", "fbgemm"))


def pad(x, rows):
    """x (n, C) with rows of zeros up to a number."""
    return F.pad(x, (0, 0, 0, rows - len(x))) if len(x) < rows else x


def fits_half(weight):
    """Whether float16 keeps three digits of a weight as a whole. It ends at 65,504, and its steps are 2^-24 or more."""
    low, high = weight.aminmax()
    return bool(max(-low, high) < 65504 and weight.norm() > 2**-15 * weight.numel() ** 0.5)


class PackedLinear(nn.Module):
    """A float32 linear layer without gradients. Its weight is stored in the order in which a product reads it.

    A few rows then take half the time, since the weight is read at the full speed of the memory. `rounds` makes it
    float16, which is half as much to read. Inputs, sums and outputs stay float32.
    """

    def __init__(self, linear, rows, rounds=False):
        super().__init__()
        weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.rounds, self.least = rounds, 1
        if rounds:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        else:
            # With AVX-512 oneDNN reads the weight for six rows a fifth faster than for one. With AVX2 it is slower.
            self.least = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, self.least))

    def forward(self, x):
        rows = x.flatten(0, -2)  # (n, C)
        y = self.product(pad(rows, self.least))
        return y[: len(rows)].unflatten(0, x.shape[:-1])

    def product(self, x, then="none", other=None):
        """The outputs of rows x (n, C), of at least `least` rows for the full speed.

        `then` is what follows at once: none, gelu, or add, which adds `other`.
        """
        if self.rounds:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
            return F.gelu(y, approximate="tanh") if then == "gelu" else y + other if then == "add" else y
        if then == "add":
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "tanh")


class LikelyLinear(nn.Module):
    """An output layer for one row, exact for the `top` likeliest ids. It reads little more than half of the bytes.

    The weight rounded to float16 gives all logits and how far each of them may be off. Those that may be among the
    `top` largest are computed again with the weight as it is. The others stay rounded, and below them.
    """

    def __init__(self, weight, top):
        super().__init__()
        self.weight, self.half, self.top = weight, weight.half(), min(top, len(weight))
        self.size = weight.norm(dim=1)  # (V,)
        # What the rounding took from each row, in pieces that stay in the cache. The product adds up in float32, where
        # it loses less than 2^-13 of |w| |x|, and float16 counts in steps of 2^-24.
        lost = [(w - h).norm(dim=1) for w, h in zip(weight.split(1024), self.half.split(1024), strict=True)]
        self.lost = torch.cat(lost) + 2**-13 * self.size + 2**-24

    @staticmethod
    def fits(weight):
        """Whether no product with inputs of at most 1 in size is beyond float16."""
        return weight.norm(p=1, dim=1).amax() < 65504

    def forward(self, x):
        """x (1, C) -> (1, V)."""
        scale = max(x.abs().amax().item(), 1e-30)
        y = x / scale
        rounded = y.half()
        logits = F.linear(rounded, self.half).float()[0]  # (V,), which float16 rounds by 2^-11 of each at most
        off = y.norm() * self.lost
        off.add_((y - rounded).norm() * self.size).add_(logits.abs(), alpha=2**-11)
        # At least `top` ids have a logit of `bound` or more. Of each group of some eight ids the largest one is looked
        # at, so that fewer are sorted. Ids that are passed over could only raise the bound.
        fold = min(8, len(logits) // self.top)
        lowest = (logits - off)[: len(logits) // fold * fold]
        bound = lowest.view(fold, -1).amax(dim=0).topk(self.top).values[-1]
        near = (logits + off >= bound).nonzero()[:, 0]
        logits[near] = self.weight.index_select(0, near) @ y[0]
        return logits[None] * scale


def steps(block):
    """The norms and the products of a packed block, in order. They are looked up once, and not for each token."""
    norms = [
        partial(torch.layer_norm, normalized_shape=ln.normalized_shape, weight=ln.weight, bias=ln.bias, eps=ln.eps)
        for ln in (block.ln_1, block.ln_2)
    ]
    attn, mlp = block.attn, block.mlp
    return norms[0], attn.c_attn.product, attn.c_proj.product, norms[1], mlp.c_fc.product, mlp.c_proj.product


def one_token(model, blocks, cache, ids, past):
    """GPT.hidden for a single position after `past` others: ids (B, 1) -> (B, 1, C). `blocks` has the steps of each."""
    t, B = model.transformer, len(ids)
    x = pad(t.wte(ids[:, 0]) + t.wpe.weight[past], t.h[0].attn.c_attn.least)  # (rows, C)
    y = torch.zeros_like(x)
    out = y[:B].view(B, cache.size(3), 1, -1)  # (B, nh, 1, hs): y by heads, in the same memory
    C, hs = x.size(1), out.size(3)
    # For each block the place of this position (2, B, nh, 1, hs), and what it sees (B, nh, past + 1, hs).
    places = cache.narrow(4, past, 1).unbind()
    keys, values = (z.unbind() for z in cache.narrow(4, 0, past + 1).unbind(1))
    for i, (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj) in enumerate(blocks):
        qkv = c_attn(ln_1(x))  # (rows, 3C). It is contiguous, and views by strides are the fewest operations.
        places[i].copy_(qkv.as_strided((2, *out.shape), (C, 3 * C, hs, hs, 1), C))
        q = qkv.as_strided(out.shape, (3 * C, hs, hs, 1))
        out.copy_(F.scaled_dot_product_attention(q, keys[i], values[i]))
        x = attn_proj(y, "add", x)
        x = mlp_proj(c_fc(ln_2(x), "gelu"), "add", x)
    return t.ln_f(x[:B])[:, None]


@torch.no_grad()
def is_the_models_own(model, blocks, samples):
    """Whether one_token() gives what GPT.hidden gives. It does not where the blocks of model.py were changed."""
    c = model.config
    past, generator = min(8, c.block_size - 1), torch.Generator().manual_seed(0)
    shape = (c.n_layer, 2, samples, c.n_head, past + 1, c.n_embd // c.n_head)
    cache, ids = torch.randn(shape, generator=generator), torch.zeros(samples, 1, dtype=torch.long)
    own = model.hidden(ids, cache.clone(), past)
    return bool((one_token(model, blocks, cache, ids, past) - own).norm() <= 1e-3 * own.norm())


def pack(model, samples, rounds=False, top=0, vocab_size=0):
    """Make a float32 model fast at writing `samples` at once. It can only generate afterwards. Needs available(rounds).

    rounds: whether the weights are rounded to float16. top: how many of the likeliest ids are drawn from, among the
    first `vocab_size`; 0 is all of them.
    """
    weight = model.lm_head.weight.detach()
    # Rows that are read twice cost more than those of a product. With a twentieth of the ids nothing is gained.
    likely = samples == 1 and 0 < 20 * top < len(weight) and not rounds and LikelyLinear.fits(weight)
    linears = [
        (part, name, rounds and fits_half(layer.weight))
        for part in model.modules()
        for name, layer in part.named_children()
        if isinstance(layer, nn.Linear) and not (likely and layer is model.lm_head)
    ]

    def exchange(linear):  # Its own weight is free then.
        part, name, half = linear
        setattr(part, name, PackedLinear(getattr(part, name), samples, half))

    # oneDNN packs a layer with all threads, FBGEMM with one. The largest layer, the output layer, is begun first.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        each = pool.map if rounds else map
        list(each(exchange, linears))
    if likely:  # The blocks' weights have left the memory for it.
        model.lm_head = LikelyLinear(weight[: vocab_size or None], top)
    hidden, blocks = model.hidden, [steps(block) for block in model.transformer.h]

    def hidden_at(idx, cache=None, past=0):
        return one_token(model, blocks, cache, idx, past) if past and idx.size(1) == 1 else hidden(idx, cache, past)

    if is_the_models_own(model, blocks, samples):
        model.hidden = hidden_at
