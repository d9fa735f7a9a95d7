"""transformers' layout of a GPT-2 <-> ours: a folder, or a repository on the Hugging Face hub."""

import io
import json
import os
from concurrent.futures import Future, wait
from contextlib import redirect_stdout, suppress
from pathlib import Path
from threading import Thread

from lib import settings, tokenizer
from lib.assemble import Diverged, assemble
from lib.settings import UserError
from model import GPTConfig

import torch

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "model.safetensors")
# What tells the tokenizer: the files that GPT-2 and our exports have, and those of other kinds of tokenizer.
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
OF_OTHERS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model", "vocab.txt", "bpe.codes")
# The classes of transformers that read VOCABULARIES as GPT-2's.
CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None)
# transformers keeps these as OpenAI's "Conv1D", the transpose of a linear layer's weight.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SILENCE = 60  # seconds without a byte from the hub, after which we give up


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}; it must be a GPT-2's") from None
    weights = folder / "model.safetensors"
    try:
        stored = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} cannot be read ({error}); fetch it again") from None
    state = {}
    for stored_name, p in stored.items():
        name = stored_name if stored_name.startswith(("transformer.", "lm_head.")) else f"transformer.{stored_name}"
        if name in state:
            raise UserError(f"{weights} holds {name} twice, with and without `transformer.`; remove the wrong one")
        # Older versions of transformers store their causal masks, which are no weights.
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name] = p.t() if name.endswith(CONV1D) and p.dim() == 2 else p
    try:
        model = assemble(config, state)
    except Diverged as error:
        raise UserError(f"{weights}: {error}; take another model") from None
    except ValueError as error:
        raise UserError(f"{weights} does not fit its config.json: {error}") from None
    return model, find_tokenizer(source, folder, hf)


def download(source):
    """Download a model by its name. Returns its folder in the hub's cache. Raises UserError.

    The hub's client waits without end for some answers. So it runs in a thread, which is left after SILENCE.
    """
    repo, outcome = f"openai-community/{source}" if str(source) in GPT2_NAMES else str(source), Future()
    try:
        # The import reads the environment, and fails where HF_ENDPOINT or a limit there makes no sense. It then prints.
        with redirect_stdout(io.StringIO()):
            from huggingface_hub import constants, snapshot_download

        def fetch():
            try:
                outcome.set_result(snapshot_download(repo, allow_patterns=[*FILES, *VOCABULARIES, *OF_OTHERS]))
            except Exception as error:
                outcome.set_exception(error)

        cache = Path(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
        received = size(cache)
        Thread(target=fetch, daemon=True).start()
        # What is in the cache already takes less than 2 seconds.
        if not wait([outcome], min(2, SILENCE)).done:
            settings.say_once(f"fetching {repo} from the hub")
        while not wait([outcome], SILENCE).done:
            before, received = received, size(cache)
            if received == before:
                constants.HF_HUB_OFFLINE = True  # The client's own threads, which Python waits for, try no more.
                raise TimeoutError(f"no byte came in {SILENCE} seconds")
        return Path(outcome.result())
    except Exception as error:  # The hub's client lets through what its HTTP library raises.
        reason = f"{type(error).__name__}: {settings.brief(error)}"
        raise UserError(
            f"{source} cannot be had from the hub ({reason}); without a network, give a checkpoint or a folder"
        ) from None


def size(folder):
    """The bytes of the files under a folder, which may come and go."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


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
    n_inner = 0 if hf.get("n_inner") is None else hf["n_inner"]
    return GPTConfig(block_size=hf.get("n_positions", "missing"), n_inner=n_inner, **sizes)


# ---- the tokenizer ----


def find_tokenizer(source, folder, hf):
    """The spec of a folder's tokenizer by what lies there; '' where nothing does. Raises UserError.

    export.py writes the spec into config.json. Elsewhere the folder's files show whether the tokenizer is GPT-2's.
    Where a file contradicts that, the spec is tokenizer.UNKNOWN and says which.
    """
    spec = "" if hf.get("tokenizer_spec") is None else hf["tokenizer_spec"]
    try:
        tokenizer.check_spec(spec)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    if spec and not tokenizer.vocab_size_of(spec):
        return spec
    vocabularies = {file: read_evidence(folder / file) for file in VOCABULARIES if os.path.lexists(folder / file)}
    if str(source) in GPT2_NAMES or vocabularies.keys() & {"vocab.json", "merges.txt", "tokenizer.json"}:
        spec = spec or "gpt2"
    contradictions = [file for file in OF_OTHERS if os.path.lexists(folder / file)]
    contradictions += ["tokenizer_class"] if hf.get("tokenizer_class") not in CLASSES else []
    wanted = tokenizer_files(spec or "gpt2") if vocabularies else {}
    for file, content in vocabularies.items():
        try:
            contradictions += [] if agrees(file, content, wanted) else [file]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / file} is not a vocabulary ({error}); mend it, or remove it") from None
    name = "GPT-2's" if spec in ("", "gpt2") else f"that of the tokenizer {spec[:40]!r}"
    return f"{tokenizer.UNKNOWN}the {contradictions[0]} of {source} is not {name}" if contradictions else spec


def read_evidence(path):
    """What one of VOCABULARIES holds: JSON, or the list of merges. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; remove it")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return [line for line in text.splitlines() if line and not line.startswith("#version")]
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a vocabulary ({error}); mend it, or remove it") from None


def agrees(file, content, wanted):
    """Whether one of VOCABULARIES gives text the ids that our own tokenizer_files() `wanted` give it.

    Raises ValueError, KeyError, TypeError or AttributeError for the content of another kind of file.
    """
    ours = wanted["tokenizer.json"]
    vocab, merges = ours["model"]["vocab"], ours["model"]["merges"]
    if file in ("vocab.json", "merges.txt"):
        return content == (vocab if file == "vocab.json" else merges)
    if file == "added_tokens.json":
        added = content.items()
    elif file == "tokenizer_config.json":
        if content.get("tokenizer_class") not in CLASSES or content.get("add_prefix_space"):
            return False
        added = [(token["content"], int(i)) for i, token in content.get("added_tokens_decoder", {}).items()]
    else:
        model, our_cut = content["model"], ours["pre_tokenizer"]
        cut = content.get("pre_tokenizer", our_cut)
        # transformers writes a merge as a pair since 2024, and as a text before that.
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", merges)]
        options = ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        if (model["vocab"], model.get("type", "BPE"), pairs) != (vocab, "BPE", merges):
            return False
        if content.get("normalizer") or any(model.get(option) for option in options) or bool(cut) != bool(our_cut):
            return False
        if cut and any(cut.get(key, our_cut[key]) != our_cut[key] for key in ("type", "add_prefix_space", "use_regex")):
            return False
        added = [(token["content"], token["id"]) for token in content.get("added_tokens", [])]
    # Tokens beyond the vocabulary change the ids of no other text.
    end = tokenizer.ENDOFTEXT
    return all(vocab.get(end) == i if text == end else text not in vocab and i >= len(vocab) for text, i in added)


def tokenizer_files(spec):
    """{name: text or JSON} of the files that transformers' AutoTokenizer reads, for the ids of a tokenizer's spec."""
    special, contents, merges, eot = [], {}, [], tokenizer.eot_of(spec)
    if spec == "gpt2":
        vocab_json, merges_txt = tokenizer.gpt2_files()
        vocab, merges = json.loads(vocab_json), merges_txt.splitlines()[1:]
        contents = {"vocab.json": vocab_json, "merges.txt": merges_txt}
    elif spec == "bytes":
        vocab = {letter: byte for byte, letter in enumerate(tokenizer.byte_letters())} | {tokenizer.ENDOFTEXT: eot}
    else:
        vocab = {char: i for i, char in enumerate(spec.removeprefix("char:"))}
    if eot >= 0:
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        special = [{"id": eot, "content": tokenizer.ENDOFTEXT, **flags}]
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    contents["tokenizer.json"] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": bytelevel if special else None,
        "post_processor": None,
        "decoder": bytelevel if special else {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None, "fuse_unk": False},
    }
    contents["tokenizer_config.json"] = {
        "tokenizer_class": "GPT2Tokenizer" if spec == "gpt2" else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token") if special else (), tokenizer.ENDOFTEXT),
    }
    return contents


# ---- the way back ----


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
