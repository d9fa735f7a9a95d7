"""GPT-2 as OpenAI published it: learned positions, pre-norm blocks, tanh-GELU, tied output layer.

Self-contained: torch and the standard library, and safetensors and huggingface_hub in the functions that need them.
Axes: B sequences, T positions, C = n_embd channels, nh heads of hs channels, V ids, N positions of all sequences.
The state dict has nanoGPT's names.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError for one that cannot be built."""

    block_size: int = 1024  # positions
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as GPT-2 has it
    n_inner: int = 0  # width of the MLP; 0 is 4 * n_embd

    def __post_init__(self):
        sizes = {"block_size": 1, "vocab_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "n_inner": 0}
        for name, least in sizes.items():
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r}: {name} must be a whole number of at least {least}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them")

    def num_params(self):
        """Parameters of such a model without its position embeddings; the tied matrix counts once."""
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
        """x (B, T, C) -> (B, T, C). `cache` (2, B, nh, block_size, hs) holds keys and values of `past` positions."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            cache[0, :, :, past : past + T], cache[1, :, :, past : past + T] = k, v
            k, v = cache[:, :, :, : past + T]  # (B, nh, past + T, hs) each
        # With a past there is one query, the newest position, and it may look at everything.
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


class PackedLinear(nn.Module):
    """A float32 linear layer for a CPU, without gradients, its weight stored in the order in which oneDNN reads it.

    That multiplies a few rows in half the time, as it reads memory at full speed. One row can have less to read: the
    weight rounded to `dtype`.
    """

    def __init__(self, linear, rows, dtype):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.rounded = linear.weight.detach().to(dtype) if dtype != torch.float32 else None
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x):
        if self.rounded is not None and x.numel() == x.size(-1):
            y = F.linear(x.to(self.rounded.dtype), self.rounded).float()
            return y if self.bias is None else y + self.bias
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# ----------------------------------------------------------------------------------------------------------------------
# The loss, in chunks of positions: the (N, V) logits of a large batch are never in memory at once


def compute_dtype(x):
    """The precision of the matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def output_weight(weight, dtype):
    """The output layer's weight (V, C) in the compute precision.

    A cast copies it anyway, so the copy gets rows of zeros up to a multiple of 64, which matrix units need to run at
    full speed. Its surplus logits are cut off again (`[:, :V]`) before anything looks at them.
    """
    if weight.dtype == dtype:
        return weight
    padded = weight.new_zeros((-(-weight.size(0) // 64) * 64, weight.size(1)), dtype=dtype)
    padded[: weight.size(0)] = weight
    return padded


def chunk_rows(vocab_size, device):
    """Positions in a chunk: enough for the matrix products, and logits that stay small (on a CPU: near its cache)."""
    budget = (1 << 24) if device.type == "cpu" else (1 << 28)  # logits
    return max(64, budget // vocab_size // 64 * 64)


def chunk_buffer(positions, weight):
    """An empty (rows, V) for the logits of each chunk in turn: fresh memory costs a CPU more than the arithmetic on it.

    On a CPU it is laid out by columns, in which the product with the weight runs 1.5 times as fast.
    """
    V = weight.size(0)
    rows = max(1, min(positions, chunk_rows(V, weight.device)))
    return weight.new_empty(V, rows).T if weight.device.type == "cpu" else weight.new_empty(rows, V)


def softmax_nll(logits, targets):
    """(e, total, nll) of logits (n, V): e / total is their softmax, nll (n, 1) -ln p of the targets (n, 1); float32.

    float32 logits are overwritten by e. Whoever needs e / total scales what he makes of e, which is smaller.
    """
    if logits.dtype != torch.float32:
        logprobs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        nll = -logprobs.gather(1, targets)
        return logprobs.exp_(), torch.ones_like(nll), nll
    top = logits.amax(dim=1, keepdim=True)
    wanted = logits.gather(1, targets) - top
    e = logits.sub_(top).exp_()
    total = e.sum(dim=1, keepdim=True)
    return e, total, total.log() - wanted


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean over the targets >= 0 of -ln softmax(x @ weight.T)[target], with both gradients computed on the way.

    The gradients are those of the sum, kept as they are until backward() scales them by grad_output / count: a loss
    scale therefore never multiplies a half-precision intermediate.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        """x (N, C), weight (V, C), targets (N,) -> float32 scalar."""
        dtype, V = compute_dtype(x), weight.size(0)
        h, w = x.to(dtype), output_weight(weight, dtype)
        grad_x = torch.empty_like(h)
        grad_w = torch.zeros_like(w, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        scored = targets >= 0
        logits = chunk_buffer(len(h), w)  # (rows, V) and the padding
        for i in range(0, len(h), len(logits)):
            part = slice(i, i + len(logits))
            index, counts = targets[part].clamp(min=0)[:, None], scored[part, None].float()
            products = torch.mm(h[part], w.T, out=logits[: len(index)])
            e, mass, nll = softmax_nll(products[:, :V], index)
            total += (nll * counts).sum()
            # d(sum of losses)/d(logits) = softmax - one-hot, zero where the target does not count: here times `mass`,
            # and divided by it in what is smaller. It takes the place of the products; in the padding they are zero.
            e.scatter_add_(1, index, -mass)
            if dtype != torch.float32:
                products[:, :V] = e
            scale = (counts / mass).to(dtype)
            torch.mm(products, w, out=grad_x[part]).mul_(scale)
            if dtype == torch.float32:
                grad_w.addmm_(products.T, h[part] * scale)
            else:
                grad_w += products.T @ (h[part] * scale)
        count = scored.sum()
        ctx.save_for_backward(grad_x, grad_w[:V], count)
        ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_w, count = ctx.saved_tensors
        scale = (grad_output / count).view(1, 1)  # with dimensions it promotes half precision to float32
        return (grad_x * scale).to(ctx.dtypes[0]), (grad_w * scale).to(ctx.dtypes[1]), None


def chunked_nll(x, weight, targets):
    """-ln p of each target (N,) as float32 (N,), from x (N, C) and weight (V, C); no gradient."""
    dtype, V = compute_dtype(x), weight.size(0)
    h, w = x.to(dtype), output_weight(weight, dtype)
    logits, nll = chunk_buffer(len(h), w), h.new_empty(len(h), dtype=torch.float32)
    for i in range(0, len(h), len(logits)):
        part = slice(i, i + len(logits))
        products = torch.mm(h[part], w.T, out=logits[: len(h[part])])
        nll[part] = softmax_nll(products[:, :V], targets[part, None])[2][:, 0]
    return nll


# ----------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """model(idx, targets) has the loss to train on, model(idx) the logits; nll() scores, generate() writes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # the backward pass computes a block's activations again instead of keeping them
        with torch.device("meta"):  # without memory, since torch's own initial values take as long again as ours below
            self.transformer = nn.ModuleDict(
                dict(
                    wte=nn.Embedding(config.vocab_size, config.n_embd),
                    wpe=nn.Embedding(config.block_size, config.n_embd),
                    drop=nn.Dropout(config.dropout),
                    h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                    ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
                )
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.transformer.wte.weight  # tied
        # 0.02 for every matrix; the projections back into the residual stream are scaled down, since 2 n_layer of
        # them add up there (GPT-2 paper, 2.3).
        for name, p in self.named_parameters():
            if p.dim() == 2:
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

    def compile_blocks(self):
        """torch.compile every block in place: they share one compiled graph, and parameter names stay as they are."""
        for block in self.transformer.h:
            block.compile(dynamic=False)

    def uncompile_blocks(self):
        for block in self.transformer.h:
            block._compiled_call_impl = None

    def pack(self, rows, dtype=torch.float32):
        """Make this float32 model, on a CPU with oneDNN, fast at `rows` tokens a time, and good for nothing else.

        dtype: what weights are rounded to where one token stands alone.
        """
        for block in self.transformer.h:
            for part in (block.attn, block.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, PackedLinear(linear, rows, dtype))
        self.lm_head = PackedLinear(self.lm_head, rows, dtype)

    def hidden(self, idx, cache=None, past=0):
        """Final hidden states (B, T, C) of ids (B, T), which stand at the positions from `past` on."""
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit in block_size={self.config.block_size}")
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[past:end])  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if cache is not None:
                x = block(x, cache[i], past)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # dropout is drawn again as it was
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """ids (B, T) -> (logits (B, T, V), None); with targets (B, T), where -1 does not count: (None, mean loss)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def nll(self, idx, targets):
        """-ln p of the targets (B, T) that are >= 0, in their order, float32; only they go through the output layer."""
        scored = targets >= 0
        return chunked_nll(self.hidden(idx)[scored], self.lm_head.weight, targets[scored])

    @torch.no_grad()
    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eot=-1,
        vocab_size=0,
        generator=None,
        use_cache=True,
    ):
        """Continue the prompts idx (B, T >= 1), yielding the next id of each, (B,), as it is drawn.

        temperature 0 takes the likeliest. top_k keeps so many ids (0: all), then top_p the likeliest of them that
        together have that probability. A sample that has drawn `eot` goes on with it; when all have, generation ends.
        Only ids below vocab_size (0: all) are drawn. A full context goes on from its newest half, which is read again.
        use_cache=False reads the whole context at every step: the same ids, slowly. Raises ValueError where a logit is
        not finite.
        """
        c = self.config
        context, done = idx[:, -c.block_size :], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        shape = (c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = compute_dtype(self.lm_head.weight)
        cache, past = torch.empty(shape, dtype=dtype, device=idx.device) if use_cache else None, 0
        for _ in range(max_new_tokens):
            if context.size(1) > c.block_size:
                context, past = context[:, -max(1, c.block_size // 2) :], 0
            x = self.hidden(context[:, past:], cache, past)
            past = context.size(1) if use_cache else 0
            logits = self.lm_head(x[:, -1])[:, : vocab_size or None].float()  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its training has diverged")
            drawn = draw(logits, temperature, top_k, top_p, generator)  # (B,)
            if eot >= 0:
                drawn = torch.where(done, eot, drawn)
                done |= drawn == eot
            yield drawn
            if eot >= 0 and done.all():
                return
            context = torch.cat([context, drawn[:, None]], dim=1)

    def optim_groups(self, weight_decay, muon=False):
        """Parameter groups in nanoGPT's order: matrices, which decay, then biases and norms, which do not.

        `muon`: the matrices of the blocks make a third group, marked for that optimizer; embeddings stay in the first.
        """
        inner = dict.fromkeys(p for p in self.transformer.h.parameters() if muon and p.dim() >= 2)  # a set in order
        outer = [p for p in self.parameters() if p.dim() >= 2 and p not in inner]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": outer, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return groups + ([{"params": [*inner], "weight_decay": weight_decay, "muon": True}] if muon else [])

    def crop_block_size(self, block_size):
        """Keep the first `block_size` positions."""
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False
        )

    def set_dropout(self, p):
        self.config = replace(self.config, dropout=p)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    @classmethod
    def from_huggingface(cls, name_or_folder):
        """A GPT-2 in Hugging Face's layout: a folder, or a name on the hub. Weights are read from safetensors only.

        Raises ValueError for a model that is not a GPT-2 as published, OSError where it cannot be had.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(name_or_folder)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name_or_folder, allow_patterns=["config.json", "model.safetensors"]))
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; it takes config.json and model.safetensors")
        try:
            hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config = huggingface_config(hf)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}; it takes a GPT-2's") from None
        try:
            state = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'} cannot be read ({error}); fetch it again") from None
        state = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v for k, v in state.items()}
        # Masks of older transformers versions are buffers, not weights; the output layer is tied.
        state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        if "transformer.wte.weight" in state:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        model = cls(config)
        wanted = model.state_dict()
        state = {k: v.t() if k.endswith(CONV1D) and v.dim() == 2 else v for k, v in state.items()}
        wrong = [k for k in wanted if k not in state or state[k].shape != wanted[k].shape]
        if wrong := wrong + sorted(set(state) - set(wanted)):
            raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: {wrong[0]}")
        model.load_state_dict(state)
        return model

    def to_huggingface(self):
        """(config.json as a dict, state dict) of transformers' GPT2LMHeadModel; absent biases are zeros there."""
        c, state = self.config, {}
        for name, p in self.state_dict().items():
            if name != "lm_head.weight":
                state[name] = (p.t() if name.endswith(CONV1D) else p).contiguous()
            bias = name.removesuffix("weight") + "bias"
            if not c.bias and name.endswith("weight") and not name.startswith(("transformer.w", "lm_head")):
                state[bias] = torch.zeros(len(p))
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "vocab_size": c.vocab_size,
            "n_positions": c.block_size,
            "n_ctx": c.block_size,
            "n_embd": c.n_embd,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_inner": c.n_inner or None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout),
        }
        return config, state


# Hugging Face's GPT-2 keeps these as OpenAI's "Conv1D", the transpose of a linear layer's weight.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def huggingface_config(hf):
    """The GPTConfig of a Hugging Face config.json. Raises ValueError for a variant that computes something else."""
    as_published = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
    }
    for key, value in as_published.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key} is {hf[key]!r}, GPT-2 has {value!r}")
    sizes = {k: hf.get(k, "missing") for k in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(block_size=hf.get("n_positions", "missing"), n_inner=hf.get("n_inner") or 0, **sizes)


def draw(logits, temperature, top_k, top_p, generator=None):
    """Ids (B,) drawn from logits (B, V); see GPT.generate."""
    if temperature < 1e-6:  # below that no other id has a probability in float32
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no temperature can overflow the largest, 0
    V, ids = logits.size(-1), None
    if 0 < top_k < V or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)  # (B, k) both, the likeliest first
    if top_p < 1:
        probs = logits.softmax(dim=-1)
        # Dropped: what comes after the ids that already have top_p together. The likeliest always stays.
        drop = probs.cumsum(dim=-1) - probs >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop, -math.inf)
    drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1), of the k
    return drawn[:, 0] if ids is None else ids.gather(1, drawn)[:, 0]


def model_args(config):
    """nanoGPT's seven arguments of a model, for its checkpoint format, which knows no n_inner."""
    return {k: v for k, v in asdict(config).items() if k != "n_inner"}
