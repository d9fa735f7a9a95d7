"""Weights -> a model, once every shape has been compared and before anything is built."""

from model import GPT

import torch

PRECISIONS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Diverged(ValueError):
    """Weights that are not finite."""


def assemble(config, state):
    """A GPT of the weights {name: tensor}, in float32. lm_head.weight may be left out, since it is wte.weight.

    Raises ValueError where the weights do not fit the config, and Diverged where one is not finite. A config of absurd
    sizes is refused at once.
    """
    n_layer = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if n_layer != config.n_layer:
        raise ValueError(f"n_layer={config.n_layer:,}, and there are weights of {n_layer:,} blocks")
    try:
        with torch.device("meta"):  # names and shapes alone, which take no memory
            model = GPT(config)
    except (RuntimeError, TypeError) as error:  # A size, or the product of two, is beyond 64 bits.
        raise ValueError(str(error).splitlines()[0]) from None
    state = {"lm_head.weight": state.get("transformer.wte.weight"), **state}
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in [*shapes, *sorted(state.keys() - shapes.keys())]:
        p, expected = state.get(name), shapes.get(name, "no weight of GPT-2")
        if isinstance(p, torch.Tensor) and not (is_plain(p) and p.dtype in PRECISIONS):
            raise ValueError(f"{name} is of {p.dtype}, {p.layout}, on {p.device}; wanted is a plain tensor of floats")
        shape = tuple(p.shape) if isinstance(p, torch.Tensor) else "no tensor"
        if shape != expected:
            raise ValueError(f"{name} is {shape}, wanted is {expected}")
    # The tensors become the parameters: no initial values are drawn, and nothing is copied that is float32 already.
    state = {name: p.detach().float().contiguous() for name, p in state.items()}
    for name, p in state.items():
        if not torch.stack(p.aminmax()).isfinite().all():
            raise Diverged(f"{name} is not finite: its training has diverged")
    if not torch.equal(state.pop("lm_head.weight"), state["transformer.wte.weight"]):
        raise ValueError("lm_head.weight is not transformer.wte.weight; GPT-2 ties them")
    # Two weights in one piece of memory would be trained as one.
    taken = set()
    for name, p in state.items():
        memory = p.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != p.nbytes:
            state[name] = p.clone()
        taken.add(memory.data_ptr())
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def is_plain(value):
    """Whether a value is a dense tensor in the host's memory that holds its numbers as they are."""
    if type(value) is not torch.Tensor or (value.layout, value.device.type) != (torch.strided, "cpu"):
        return False
    return not (value.is_quantized or value.is_nested or value.is_neg())
