"""What a CUDA graph records, run here without one: the same kernels whatever the position, and the same ids."""

import train
from lib import captured, runtime
from model import GPT, GPTConfig, draw

import pytest
import torch
from conftest import refusal


class Repeated:
    """Stands in for captured.Recorded: the first call's inputs stay where they are, as those of a graph do."""

    def __init__(self, work, *inputs, generator=None):
        self.work, self.inputs = work, [t.clone() for t in inputs]
        work(*self.inputs)  # The runs before a recording.

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.work(*self.inputs)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def make_work(model):
    def work(x, y):
        _, loss = model(x, y)
        loss.backward()
        return loss.detach()

    return work


def test_a_recorded_micro_batch_leaves_no_gradients_of_the_runs_before_it():
    torch.manual_seed(0)
    model, s = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)), train.Settings()
    s.batch_size, s.block_size = 3, 8
    rt = runtime.choose("cpu")
    x, y = torch.randint(16, (2, 3, 8))
    loss = make_work(model)(x, y)
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    work = captured.micro_step(make_work(model), model, s, rt, record=Repeated)
    places = [p.grad.data_ptr() for p in model.parameters()]
    assert not any(grad.any() for grad in gradients(model))
    for _ in range(2):
        assert torch.equal(work(x, y), loss)
        assert all(map(torch.equal, gradients(model), wanted))
        model.zero_grad(set_to_none=False)
    assert [p.grad.data_ptr() for p in model.parameters()] == places


def test_where_recording_fails_a_line_names_the_way_without_it():
    model, s = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)), train.Settings()
    s.batch_size, s.block_size = 3, 8

    class Fails(Repeated):
        def __init__(self, work, *inputs):
            super().__init__(work, *inputs)
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    says = refusal(captured.micro_step, make_work(model), model, s, runtime.choose("cpu"), record=Fails)
    assert "(operation not permitted when stream is capturing); --compile=False trains without" in says


@pytest.mark.parametrize("change", [dict(recompute=True), dict(world_size=2)], ids=str)
def test_what_cannot_be_recorded_is_not(change):
    s, rt = train.Settings(), runtime.choose("cpu")
    for key, value in change.items():
        setattr(s if hasattr(s, key) else rt, key, value)
    work = make_work(None)
    assert captured.micro_step(work, None, s, rt, record=pytest.fail) is work


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
