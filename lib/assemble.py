"""Weights -> a model, once every shape has been compared and before anything is built."""

from model import GPT

import torch


def assemble(config, state):
    """A GPT of the weights {name: tensor}, in float32. lm_head.weight may be left out, since it is wte.weight.

    Raises ValueError where the weights do not fit the config. A config of absurd sizes is refused at once.
    """
    state = dict(state)
    tied = state.setdefault("lm_head.weight", state.get("transformer.wte.weight"))
    n_layer = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if n_layer != config.n_layer:
        raise ValueError(f"n_layer={config.n_layer:,}, and there are weights of {n_layer:,} blocks")
    try:
        with torch.device("meta"):  # names and shapes alone, which take no memory
            model = GPT(config)
    except RuntimeError as error:  # The product of two sizes is beyond 64 bits.
        raise ValueError(str(error)) from None
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in [*shapes, *sorted(state.keys() - shapes.keys())]:
        shape = tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else "no tensor"
        expected = shapes.get(name, "no weight of GPT-2")
        if shape != expected:
            raise ValueError(f"{name} is {shape}, wanted is {expected}")
        if not state[name].is_floating_point() or state[name].layout != torch.strided:
            raise ValueError(f"{name} is of {state[name].dtype}, {state[name].layout}")
    if not torch.equal(tied, state["transformer.wte.weight"]):
        raise ValueError("lm_head.weight is not transformer.wte.weight; GPT-2 ties them")
    # The tensors become the parameters: no initial values are drawn, and nothing is copied that is float32 already.
    model.load_state_dict({name: p.float().contiguous() for name, p in state.items()}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model
