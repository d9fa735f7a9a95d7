"""One token at a time on a CPU. Reading the weights takes the time there, so they are read fast, or fewer bytes are.

Between the products lie as few operations as can be, since each of them finds its data gone from the caches.
"""

import torch
from torch import nn
from torch.nn import functional as F


def pad(x, rows):
    """x (n, C) with rows of zeros up to a number."""
    return F.pad(x, (0, 0, 0, rows - len(x))) if len(x) < rows else x


def scaled(x):
    """(x / scale, scale): inputs of at most 1 in size, of which fits_half() speaks, and the factor of the outputs."""
    scale = x.abs().amax().clamp(min=1e-30)
    return x / scale, scale


def fits_half(weight):
    """Whether products of a weight (V, C) with inputs of at most 1 in size are within float16, which ends at 65,504."""
    return weight.norm(p=1, dim=1).amax() < 65504


class PackedLinear(nn.Module):
    """A float32 linear layer without gradients. Its weight is stored in the order in which oneDNN reads it.

    A few rows then take half the time, since the weight is read at the full speed of the memory. For a single row there
    can be half as much to read: the weight rounded to float16, with `rounds`.
    """

    def __init__(self, linear, rows, rounds=False):
        super().__init__()
        weight = linear.weight.detach()
        # With AVX-512 oneDNN reads the weight for six rows a fifth faster than for one. With AVX2 it is slower.
        self.least = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, self.least))
        half = weight.half() if rounds and fits_half(weight) else None
        # float16 holds numbers down to 2^-24. A weight of smaller ones stays as it is.
        self.half = half if half is not None and (half - weight).norm() < 1e-3 * weight.norm() else None
        self.bias = None if linear.bias is None else linear.bias.detach()

    def rows_for(self, n):
        """The number of rows that a product with n rows should have."""
        return 1 if n == 1 and self.half is not None else max(n, self.least)

    def forward(self, x):
        rows = x.flatten(0, -2)  # (n, C)
        y = self.product(pad(rows, self.rows_for(len(rows))))
        return y[: len(rows)].unflatten(0, x.shape[:-1])

    def product(self, x, then="none", other=None):
        """The outputs of rows x (n, C). `then` is what follows at once: none, gelu, or add, which adds `other`."""
        if self.half is not None and len(x) == 1:
            x, scale = scaled(x)
            y = F.linear(x.half(), self.half).float() * scale
            y = y if self.bias is None else y + self.bias
            return F.gelu(y, approximate="tanh") if then == "gelu" else y + other if then == "add" else y
        if then == "add":
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "tanh")


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

    def forward(self, x):
        """x (1, C) -> (1, V)."""
        y, scale = scaled(x)
        rounded = y.half()
        logits = F.linear(rounded, self.half).float()[0]  # (V,), rounded to 2^-11 of each
        off = y.norm() * self.lost + (y - rounded).norm() * self.size + 2**-11 * logits.abs()
        near = (logits + off >= (logits - off).topk(self.top).values[-1]).nonzero()[:, 0]
        logits[near] = self.weight[near] @ y[0]
        return logits[None] * scale


def one_token(model, cache, ids, past):
    """GPT.hidden for a single position after `past` others: ids (B, 1) -> (B, 1, C)."""
    t, B = model.transformer, len(ids)
    x = pad(t.wte(ids[:, 0]) + t.wpe.weight[past], t.h[0].attn.c_attn.rows_for(B))  # (rows, C)
    y = torch.zeros_like(x)
    for block, (keys, values) in zip(t.h, cache, strict=True):  # (B, nh, block_size, hs) each
        attn, mlp = block.attn, block.mlp
        q, k, v = attn.c_attn.product(block.ln_1(x))[:B].view(B, 3, attn.n_head, -1).unbind(1)  # (B, nh, hs) each
        keys[:, :, past], values[:, :, past] = k, v
        seen = (z.narrow(2, 0, past + 1) for z in (keys, values))
        y[:B] = F.scaled_dot_product_attention(q[:, :, None], *seen).flatten(1)
        x = attn.c_proj.product(y, "add", x)
        x = mlp.c_proj.product(mlp.c_fc.product(block.ln_2(x), "gelu"), "add", x)
    return t.ln_f(x[:B])[:, None]


def pack(model, samples, rounds=False, top=0, vocab_size=0):
    """Make a float32 model fast at writing `samples` at once, on a CPU with oneDNN. It can only generate afterwards.

    rounds: whether the weights are rounded to float16 for a single sample. top: how many of the likeliest ids are drawn
    from, among the first `vocab_size`; 0 is all of them.
    """
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, PackedLinear(linear, samples, rounds))
    weight = model.lm_head.weight.detach()
    # Rows that are read twice cost more than those of a product. At a twentieth of them nothing is gained.
    if samples == 1 and 0 < 20 * top < len(weight) and not rounds and fits_half(weight):
        model.lm_head = LikelyLinear(weight[: vocab_size or None], top)
    else:
        model.lm_head = PackedLinear(model.lm_head, samples, rounds)
    hidden = model.hidden

    def hidden_at(idx, cache=None, past=0):
        return one_token(model, cache, idx, past) if past and idx.size(1) == 1 else hidden(idx, cache, past)

    model.hidden = hidden_at
