"""CUDA graphs: what a GPU does again and again is recorded once, so that no kernel waits until Python asks for it.

A replay runs the same kernels on the same memory. So inputs are copied into tensors that belong to the graph, and what
it returned is overwritten.
"""

from lib import runtime, settings
from lib.settings import UserError

import torch
from torch import nn
from torch.nn import functional as F


class Recorded:
    """The function work(*inputs) of tensors on a CUDA GPU as a graph. The next call overwrites what a call returned.

    Random numbers go on from the state that their generator has at the call: torch's own one or `generator`.
    """

    def __init__(self, work, *inputs, generator=None):
        self.inputs = [t.clone() for t in inputs]
        self.graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self.graph.register_generator_state(generator)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # Libraries and compilers make here what they can't make while it is recorded.
            for _ in range(2):
                work(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = work(*self.inputs)

    def __call__(self, *inputs):
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)
        self.graph.replay()
        return self.result


def micro_step(work, model, s, rt, record=Recorded):
    """work(x, y) of a micro-batch (B, T) each, which adds to a model's gradients, as a graph.

    With a graph the gradients are tensors that stay where they are. DDP's sums can't be recorded, nor can blocks that
    are computed again, which ask for the random state: they stay as they are. Raises UserError where recording fails,
    since torch's allocator and its generator are in the middle of it then, and nothing can go on.
    """
    if rt.world_size > 1 or s.recompute:
        return work
    x = torch.zeros(s.batch_size, s.block_size, dtype=torch.long, device=rt.device)
    try:
        work = record(work, x, x)
    except RuntimeError as error:
        if runtime.is_out_of_memory(error):
            raise
        raise UserError(
            f"a CUDA graph of a micro-batch can't be recorded ({settings.brief(error)}); --compile=False trains without"
        ) from None
    model.zero_grad(set_to_none=False)  # The runs before the recording have left theirs.
    return work


def one_token(model, cache, ids, at):
    """GPT.hidden for a single position that is a tensor, `at` (1,): ids (B, 1) -> (B, 1, C).

    Nothing that is asked of the device depends on the position. So each token looks at the whole cache, under a mask.
    """
    t = model.transformer
    x = t.wte(ids) + t.wpe.weight[at]  # (B, 1, C)
    seen = (torch.arange(cache.size(4), device=at.device) <= at)[None, None, None]  # (1, 1, 1, block_size)
    for block, (keys, values) in zip(t.h, cache, strict=True):  # (B, nh, block_size, hs) each
        attn = block.attn
        heads = attn.c_attn(block.ln_1(x)).unflatten(2, (3, attn.n_head, -1))  # (B, 1, 3, nh, hs)
        q, k, v = heads.transpose(1, 3).unbind(2)  # (B, nh, 1, hs) each
        keys.index_copy_(2, at, k.to(keys.dtype))
        values.index_copy_(2, at, v.to(values.dtype))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        x = x + attn.c_proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return t.ln_f(x)


class NextIds:
    """Takes the place of a model's next_ids(). A prompt is read as before, and a token after it is a replayed graph."""

    def __init__(self, read, record):
        self.read, self.record, self.cache = read, record, None

    def __call__(self, idx, cache, past, done, *how):
        if cache is None or past == 0:
            self.cache = self.token = None  # A new prompt has a cache of its own, and needs the room of the last one's.
            return self.read(idx, cache, past, done, *how)
        if self.cache is not cache:  # Each generation has a cache, samples that are done, and a generator of its own.
            self.start(idx, cache, done, how)
        if self.past != past:  # From then on the graph goes on with what it has drawn.
            self.ids.copy_(idx)
            self.at.fill_(past)
        self.past = past + 1
        drawn, flags = self.token()
        return drawn.clone(), flags

    def start(self, idx, cache, done, how):
        generator, last = how[-1], cache.size(4) - 1
        # The runs before the recording write where the last token will stand, which is overwritten in time.
        self.cache, self.past, self.ids, self.at = cache, None, idx.clone(), torch.tensor([last], device=idx.device)

        def work():
            drawn, flags = self.read(self.ids, cache, self.at, done, *how)
            self.ids.copy_(drawn[:, None])
            self.at.add_(1).clamp_(max=last)
            return drawn, flags

        before = done.clone(), generator.get_state()
        self.token = self.record(work, generator=generator)
        done.copy_(before[0])
        generator.set_state(before[1])


def capture(model, dtype, record=Recorded):
    """Make a model on a CUDA GPU fast at one token a time. Its linear layers have weights of `dtype` afterwards.

    record: what makes a graph of a function.
    """
    head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=False, device="meta")
    head.weight = nn.Parameter(model.lm_head.weight.detach().to(dtype), requires_grad=False)
    model.lm_head = head  # The embedding keeps float32.
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear.to(dtype)
    hidden = model.hidden

    def hidden_at(idx, cache, past):
        return one_token(model, cache, idx, past) if torch.is_tensor(past) else hidden(idx, cache, past)

    model.hidden = hidden_at
    model.next_ids = NextIds(model.next_ids, record)
