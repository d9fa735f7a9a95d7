"""transformers' layout of a GPT-2 <-> ours: a folder, or a repository on the Hugging Face hub."""

import json
from pathlib import Path

from lib import tokenizer
from lib.assemble import assemble
from lib.settings import UserError
from model import GPTConfig

import torch

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "model.safetensors")
# transformers keeps these as OpenAI's "Conv1D", the transpose of a linear layer's weight.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load(source):
    """(GPT, tokenizer's spec) of a folder in transformers' layout, of one of GPT2_NAMES, or of OWNER/NAME on the hub.

    The spec is '' where nothing tells which tokenizer the model has. Weights are read from safetensors only, so that
    opening a model runs no code. Raises UserError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(source) if Path(source).is_dir() else download(source)
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(
            f"{source} has no {missing[0]}; a model is opened from config.json and a single model.safetensors, which "
            "transformers' save_pretrained(FOLDER, max_shard_size='100GB') writes"
        )
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = read_config(hf)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}; it must be a GPT-2's") from None
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read ({error}); fetch it again") from None
    state = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v for k, v in state.items()}
    # Older versions of transformers store their causal masks, which are no weights.
    state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    state = {k: v.t() if k.endswith(CONV1D) and v.dim() == 2 else v for k, v in state.items()}
    try:
        model = assemble(config, state)
    except ValueError as error:
        raise UserError(f"{folder / 'model.safetensors'} does not fit its config.json: {error}") from None
    return model, find_tokenizer(source, folder, hf)


def download(source):
    """Download a model by its name. Returns its folder in the hub's cache. Raises UserError."""
    from huggingface_hub import snapshot_download

    repo = f"openai-community/{source}" if str(source) in GPT2_NAMES else str(source)
    try:
        return Path(snapshot_download(repo, allow_patterns=[*FILES, "vocab.json", "tokenizer.json"]))
    except Exception as error:  # The hub's client lets through what its HTTP library raises.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{source} cannot be had from the hub ({reason}); without a network, give a checkpoint or a folder"
        ) from None


def read_config(hf):
    """The GPTConfig of a transformers config.json. Raises ValueError for a variant that computes something else."""
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


def find_tokenizer(source, folder, hf):
    """The spec of a folder's tokenizer by what lies there; '' where nothing does. Raises UserError.

    export.py writes the spec into config.json. Elsewhere the folder's vocabulary shows whether it is GPT-2's.
    """
    if (spec := hf.get("tokenizer_spec")) is not None:
        try:
            tokenizer.check_spec(spec)
        except ValueError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None
        return spec
    if str(source) in GPT2_NAMES:
        return "gpt2"
    for file in ("vocab.json", "tokenizer.json"):
        if not (folder / file).is_file():
            continue
        try:
            vocab = json.loads((folder / file).read_text(encoding="utf-8"))
            vocab = vocab["model"]["vocab"] if file == "tokenizer.json" else vocab
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / file} is not a vocabulary ({error}); mend it, or remove it") from None
        gpt2 = json.loads(tokenizer.gpt2_files()[0].read_text(encoding="utf-8"))
        return "gpt2" if vocab == gpt2 else f"{tokenizer.UNKNOWN}the {file} of {source} is not GPT-2's"
    return ""


def convert(model):
    """(config.json as a dict, state dict) of transformers' GPT2LMHeadModel. Absent biases are zeros there."""
    c, state = model.config, {}
    for name, p in model.state_dict().items():
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
