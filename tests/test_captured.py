"""What a CUDA graph records, run here without one: the same kernels whatever the position, and the same ids."""

from lib import captured
from model import GPT, GPTConfig, draw

import pytest
import torch


class Repeated:
    """Stands in for captured.Recorded: the first call's inputs stay where they are, as those of a graph do."""

    def __init__(self, work, *inputs, generator=None):
        self.work, self.inputs = work, [t.clone() for t in inputs]
        work(*self.inputs)  # The runs before a recording.

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.work(*self.inputs)


def written(model, idx, count, **options):
    with torch.inference_mode():
        return torch.stack(list(model.generate(idx, count, **options, generator=torch.Generator().manual_seed(3))))


@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(temperature=1.3, top_k=20, top_p=0.9), dict(eot=7)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_position_in_a_tensor_gives_the_ids_of_the_plain_road(bias, options):
    """Two generations, beyond a full context, which is read again."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=57, n_layer=2, n_head=4, n_embd=32, bias=bias)).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=2.0)  # so that greedy text does not repeat itself
    prompts = torch.randint(57, (3, 5)), torch.randint(57, (2, 9))
    wanted = [written(model, idx, 60, **options) for idx in prompts]
    assert all(len(ids.unique()) > 10 for ids in wanted)
    captured.capture(model, torch.float32, record=Repeated)
    for idx, ids in zip(prompts, wanted, strict=True):
        assert torch.equal(written(model, idx, 60, **options), ids)


def test_the_weights_of_a_captured_model_are_rounded_and_its_embedding_is_not():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)).eval()
    captured.capture(model, torch.bfloat16, record=Repeated)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    rounded = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert "lm_head.weight" in rounded and "transformer.h.0.mlp.c_fc.weight" in rounded
    assert dtypes["transformer.wte.weight"] == dtypes["transformer.h.0.ln_1.weight"] == torch.float32


def test_a_draw_is_torch_multinomials():
    probs = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).mul(3)
    wanted = torch.multinomial(probs.softmax(1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    assert torch.equal(draw(probs, 1.0, 0, 1.0, torch.Generator().manual_seed(5)), wanted)
