"""GPT-2 as OpenAI published it: learned positions, pre-norm blocks, tanh-GELU, tied output layer.

Self-contained: torch and the standard library.
Axes: B sequences, T positions, C = n_embd channels, nh heads of hs channels, V ids, N positions of all sequences.
The state dict has nanoGPT's names.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError for one that cannot be built."""

    block_size: int = 1024  # positions
    vocab_size: int = 50257  # ids
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    dropout: float = 0.0  # share that is dropped of embeddings, attention and residual branches
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    n_inner: int = 0  # width of the MLP; 0 is 4 * n_embd

    def __post_init__(self):
        sizes = {"block_size": 1, "vocab_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "n_inner": 0}
        for name, least in sizes.items():
            # A bool is an int to isinstance. Torch counts in 64 bits.
            if type(value := getattr(self, name)) is not int or not least <= value < 1 << 63:
                raise ValueError(f"{name}={value!r:.40}: {name} must be a whole number of at least {least}, in 64 bits")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r:.40}: dropout must be a number from 0 to below 1")
        if type(self.bias) is not bool:
            raise ValueError(f"bias={self.bias!r:.40}: bias must be True or False")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them")

    def num_params(self):
        """The number of parameters without the position embeddings. The tied matrix counts once."""
        C, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        biases = (3 * C + C + inner + C + 2 * C) if self.bias else 0
        block = 4 * C * C + 2 * C * inner + 2 * C + biases
        return self.vocab_size * C + self.n_layer * block + (2 * C if self.bias else C)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head

    def forward(self, x, cache=None, past=0):
        """x (B, T, C) -> (B, T, C). `cache` (2, B, nh, block_size, hs) holds keys and values of `past` positions.

        After a past T is 1.
        """
        B, T, C = x.shape
        # Each of q, k and v is (B, nh, T, hs).
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            cache[0, :, :, past : past + T], cache[1, :, :, past : past + T] = k, v
            k, v = cache[:, :, :, : past + T]  # (B, nh, past + T, hs) each
        # With a past there is one query, of the newest position, and it may look at everything.
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.resid_dropout.p if self.training else 0.0, is_causal=past == 0
        )  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, past=0):
        x = x + self.attn(self.ln_1(x), cache, past)
        return x + self.mlp(self.ln_2(x))


# The loss goes through the positions in chunks, so that the (N, V) logits of a large batch are never in memory at once.


def compute_dtype(x):
    """The precision of the matrix products: autocast's where it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def output_weight(weight, dtype):
    """The output layer's weight (V, C) in the compute precision.

    A copy gets rows of zeros up to a multiple of 64, for the full speed of matrix units. Their logits are left out.
    """
    if weight.dtype == dtype and weight.device.type != "cuda":
        return weight
    return F.pad(weight.to(dtype), (0, 0, 0, -weight.size(0) % 64))


def chunk_rows(positions, weight, fused):
    """Positions in a chunk, all chunks being equal: enough for fast products, few enough that the logits stay small.

    On a CPU they stay near its cache. A GPU holds 2 GiB of logits, or a quarter without the `fused` softmax, since
    the other one makes copies.
    """
    logits = 20_000_000 if weight.device.type == "cpu" else (1 << (31 if fused else 29)) // weight.itemsize
    chunks = max(1, math.ceil(positions / max(64, logits // weight.size(0))))
    return min(positions, math.ceil(positions / chunks / 64) * 64)


def chunk_buffer(positions, weight, fused=False):
    """An empty (rows, V) that takes the logits of each chunk in turn.

    Fresh memory for each chunk would cost a CPU more than the arithmetic. There the buffer is laid out by columns, with
    which the product with the weight is 1.5 times as fast.
    """
    V, rows = weight.size(0), max(1, chunk_rows(positions, weight, fused))
    return weight.new_empty(V, rows).T if weight.device.type == "cpu" else weight.new_empty(rows, V)


def softmax_nll(logits, targets):
    """(e (n, V), total (n, 1), nll (n, 1)) of float32 logits (n, V), which e overwrites, and targets (n, 1).

    e / total is the softmax, and nll is -ln p. The division is left for the products with e, which are smaller.
    """
    top = logits.amax(dim=1, keepdim=True)
    wanted = logits.gather(1, targets) - top
    e = logits.sub_(top).exp_()
    total = e.sum(dim=1, keepdim=True)
    return e, total, total.log() - wanted


def softmax_(logits):
    """logsumexp (n, 1) in float32 of logits (n, V), which their softmax overwrites. Compiled it is one kernel."""
    log2_e = math.log2(math.e)  # A GPU has an instruction for powers of 2, and none for those of e.
    powers = logits.float() * log2_e
    top = powers.amax(dim=1, keepdim=True)
    total = top + (powers - top).exp2().sum(dim=1, keepdim=True).log2()
    logits.copy_((powers - total).exp2())
    return total / log2_e


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean over the targets >= 0 of -ln softmax(x @ weight.T)[target], with both gradients computed on the way.

    The gradients are kept as those of the sum. backward() scales them by grad_output / count, so that a loss scale
    never multiplies a half-precision intermediate.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, compiled=None):
        """x (N, C), weight (V, C), targets (N,) -> float32 scalar. `compiled` is softmax_, compiled."""
        dtype, V = compute_dtype(x), weight.size(0)
        h, w = x.to(dtype), output_weight(weight, dtype)
        softmax = compiled or (softmax_ if dtype != torch.float32 else None)
        grad_x, grad_w = torch.empty_like(h), torch.zeros_like(w, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        scored = targets >= 0
        logits = chunk_buffer(len(h), w, fused=bool(compiled))  # (rows, V and its padding)
        for i in range(0, len(h), len(logits)):
            part = slice(i, i + len(logits))
            index, counts = targets[part].clamp(min=0)[:, None], scored[part, None].float()
            products = torch.mm(h[part], w.T, out=logits[: len(index)])
            # The gradient of the sum of losses by the logits is softmax - one-hot, and 0 where the target does not
            # count. It overwrites the logits, up to a factor `scale` for each row, which the smaller products get.
            if softmax:
                products[:, V:] = -math.inf  # The padding has no probability.
                wanted, scale = products.gather(1, index).float(), counts.to(dtype)
                nll = softmax(products) - wanted
                products.scatter_(1, index, torch.expm1(-nll).to(dtype))  # p - 1, exact also where p is near 1
            else:
                e, mass, nll = softmax_nll(products[:, :V], index)
                e.scatter_add_(1, index, -mass)
                scale = counts / mass
            total += (nll * counts).sum()
            torch.mm(products, w, out=grad_x[part]).mul_(scale)
            if x.is_cuda and dtype != torch.float32:  # The matrix units add up in float32, and can hand it on.
                torch.addmm(grad_w, products.T, h[part] * scale, out_dtype=torch.float32, out=grad_w)
            else:
                grad_w.addmm_(products.T.float(), (h[part] * scale).float())
        count = scored.sum()
        ctx.save_for_backward(grad_x, grad_w[:V], count)
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_w, count = ctx.saved_tensors
        scale = (grad_output / count).view(1, 1)  # With no dimensions it would not promote half precision to float32.
        return grad_x * scale, grad_w * scale, None, None


def chunked_nll(x, weight, targets):
    """-ln p of each target (N,) as float32 (N,), from x (N, C) and weight (V, C), without a gradient.

    The logits are in float32, also where autocast has half precision, which would round them to three digits.
    """
    with torch.autocast(x.device.type, enabled=False):
        h, w = x.float(), output_weight(weight.float(), torch.float32)
        logits, nll = chunk_buffer(len(h), w), h.new_empty(len(h))
        for i in range(0, len(h), len(logits)):
            part = slice(i, i + len(logits))
            products = torch.mm(h[part], w.T, out=logits[: len(h[part])])
            nll[part] = softmax_nll(products[:, : weight.size(0)], targets[part, None])[2][:, 0]
    return nll


class GPT(nn.Module):
    """model(idx, targets) gives the loss to train on, model(idx) the logits. nll() scores, generate() writes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # whether the backward pass computes a block's activations again
        self.compiled_softmax = None  # softmax_, compiled, where the model is
        # torch's own initial values would take as long again as ours, and normal_() on meta a second of imports.
        with torch.device("meta"):
            self.transformer = t = nn.ModuleDict()
            t.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
            t.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False)
            t.drop = nn.Dropout(config.dropout)
            t.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
            t.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if torch.get_default_device().type != "meta":
            self.to_empty(device=torch.get_default_device())
        self.lm_head.weight = self.transformer.wte.weight  # tied
        # Every matrix has a deviation of 0.02. The projections back into the residual stream are scaled down, since
        # 2 n_layer of them add up there (GPT-2 paper, 2.3).
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    def num_params(self):
        return self.config.num_params()

    def flops_per_token(self):
        """Floating-point operations of forward and backward: 6N + 12 L H Q T (PaLM paper, appendix B)."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def compile_parts(self):
        """torch.compile the loss and every block in place. The blocks share a graph. Parameter names stay."""
        # Tuned on a GPU, it has few enough rows under way that the chip's cache holds them between its passes. What is
        # found to be fast may differ from run to run, and with it the last bits.
        tuned = not torch.are_deterministic_algorithms_enabled()
        self.compiled_softmax = torch.compile(softmax_, dynamic=False, options={"coordinate_descent_tuning": tuned})
        for block in self.transformer.h:
            block.compile(dynamic=False)

    def uncompile_parts(self):
        self.compiled_softmax = None
        for block in self.transformer.h:
            block._compiled_call_impl = None

    def hidden(self, idx, cache=None, past=0):
        """Final hidden states (B, T, C) of ids (B, T), which stand at the positions from `past` on.

        After a past T is 1. Raises ValueError for more than block_size positions.
        """
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit in block_size={self.config.block_size}")
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[past:end])  # (B, T, C)
        if self.training and compute_dtype(x) == torch.bfloat16:
            x = x.bfloat16()  # Half the bytes go between the blocks. float16 could not hold a large model's sums.
        for i, block in enumerate(self.transformer.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # Both passes draw the same dropout.
            else:
                x = block(x, None if cache is None else cache[i], past)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """ids (B, T) -> (logits (B, T, V), None); with targets (B, T), where -1 does not count: (None, mean loss)."""
        x = self.hidden(idx)
        return (self.lm_head(x), None) if targets is None else (None, self.cross_entropy(x, targets))

    def cross_entropy(self, x, targets):
        """The mean loss of final hidden states x (B, T, C) and targets (B, T), where -1 does not count."""
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.compiled_softmax)

    @torch.no_grad()
    def nll(self, idx, targets):
        """-ln p of the targets (B, T) that are >= 0, in their order, float32. Only they go through the output layer."""
        scored = targets >= 0
        return chunked_nll(self.hidden(idx)[scored], self.lm_head.weight, targets[scored])

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1, top_k=0, top_p=1, eot=-1, vocab_size=0, generator=None, use_cache=True
    ):
        """Continue the prompts idx (B, T >= 1), yielding the next id of each, (B,), as it is drawn.

        temperature 0 takes the likeliest id. top_k keeps so many of the likeliest ids, 0 all. top_p then keeps the
        likeliest of them that have this probability together. Only ids below vocab_size are drawn; 0 is all. A sample
        that has drawn `eot` goes on with it, and when all have, generation ends. A full context goes on from its newest
        half, which is read again. use_cache=False reads the whole context at every step, which gives the same ids
        slowly. Raises ValueError where a logit is not finite.
        """
        c, dtype = self.config, compute_dtype(self.transformer.wte.weight)
        context, done = idx[:, -c.block_size :], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        shape = (c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        cache = torch.zeros(shape, dtype=dtype, device=idx.device) if use_cache else None
        past, how = 0, (eot, vocab_size, temperature, top_k, top_p, generator)
        for _ in range(max_new_tokens):
            if context.size(1) > c.block_size:
                context, past = context[:, -max(1, c.block_size // 2) :], 0
            drawn, flags = self.next_ids(context[:, past:], cache, past, done, *how)
            finite, ended = flags.tolist()  # the one wait for the device
            if not finite:
                raise ValueError("the model's logits are not finite: its training has diverged")
            yield drawn
            if ended:
                return
            past = context.size(1) if use_cache else 0
            context = torch.cat([context, drawn[:, None]], dim=1)

    def next_ids(self, idx, cache, past, done, eot, vocab_size, *how):
        """Draw after idx (B, T), at positions from `past` on: (ids (B,), [logits are finite, all samples are done]).

        `done` (B,) says which samples have drawn `eot`. It is kept up.
        """
        logits = self.lm_head(self.hidden(idx, cache, past)[:, -1])[:, : vocab_size or None].float()  # (B, V)
        drawn = draw(logits, *how)
        if eot >= 0:
            drawn = torch.where(done, eot, drawn)
            done |= drawn == eot
        return drawn, torch.stack([logits.sum().isfinite(), done.all()])  # A sum is a single pass over them.

    def optim_groups(self, weight_decay, muon=False):
        """Parameter groups in nanoGPT's order: matrices, which decay, then biases and norms, which do not.

        With `muon` the matrices of the blocks make a third group, marked for Muon. Embeddings stay in the first.
        """
        inner = dict.fromkeys(p for p in self.transformer.h.parameters() if muon and p.dim() >= 2)  # an ordered set
        outer = [p for p in self.parameters() if p.dim() >= 2 and p not in inner]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": outer, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return groups + [{"params": [*inner], "weight_decay": weight_decay, "muon": True}] * muon

    def crop_block_size(self, block_size):
        """Keep the first `block_size` positions."""
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight.detach()[:block_size].clone())

    def set_dropout(self, p):
        self.config = replace(self.config, dropout=p)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p


def draw(logits, temperature, top_k, top_p, generator=None):
    """Ids (B,) drawn from logits (B, V), as GPT.generate describes it."""
    if temperature < 1e-6:  # Below that no other id has a probability in float32.
        return logits.argmax(dim=-1)
    V, ids = logits.size(-1), None
    if 0 < top_k < V or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)  # (B, k) both, the likeliest first
    # The largest logit becomes 0, which no temperature can make overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_p < 1:
        probs = logits.softmax(dim=-1)
        # An id is dropped if those before it have top_p together already. The likeliest always stays.
        drop = probs.cumsum(dim=-1) - probs >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop, -math.inf)
    # torch.multinomial draws a single id like this too, but waits for a GPU to check the probabilities.
    waits = torch.empty_like(logits).exponential_(generator=generator)
    drawn = (logits.softmax(dim=-1) / waits).argmax(dim=-1, keepdim=True)  # (B, 1), of the k
    return drawn[:, 0] if ids is None else ids.gather(1, drawn)[:, 0]
