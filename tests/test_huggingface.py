"""lib/huggingface.py: folders in transformers' layout are read to the bit, or refused in a line that says why."""

import json
import re
import time

from lib import checkpoint, huggingface, tokenizer

import huggingface_hub
import pytest
import torch
from conftest import random_model, refusal, same_bits, save_huggingface
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

SMALL = dict(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


def load(folder):
    """The model of a folder."""
    return huggingface.load(str(folder))[0].eval()


def change_weights(folder, **changes):
    """Replace weights of a folder's model.safetensors. None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({name: p for name, p in state.items() if p is not None}, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A folder of a small model whose tokenizer is not known."""
    save_huggingface(random_model(**SMALL), tmp_path / "hf")
    return tmp_path / "hf"


# ---- what is read ----


@pytest.mark.parametrize("shape", [{}, dict(n_inner=24, n_head=8), dict(n_layer=3, n_embd=24)], ids=str)
def test_a_folder_round_trips_to_the_bit(shape, tmp_path):
    model = random_model(**SMALL | shape)
    again = load(save_huggingface(model, tmp_path))
    assert again.config == model.config
    assert same_bits(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_folder_that_transformers_wrote_opens(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    idx = torch.randint(50, (2, 12))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def test_published_names_and_masks_are_read(folder):
    """On the hub no name begins with `transformer.`, and older files hold the causal masks."""
    wanted = load(folder).state_dict()
    state = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 12, 12), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state | masks, folder / "model.safetensors")
    assert same_bits(load(folder).state_dict(), wanted)


def test_absent_biases_are_written_as_zeros_and_read_back(tmp_path):
    model = random_model(**SMALL, bias=False)
    again = load(save_huggingface(model, tmp_path))
    state, wanted = again.state_dict(), model.state_dict()
    added = state.keys() - wanted.keys()
    assert added == random_model(**SMALL).state_dict().keys() - wanted.keys()
    assert all(not state[name].any() for name in added)
    assert same_bits({name: state[name] for name in wanted}, wanted)
    idx = torch.randint(50, (2, 12))
    assert torch.allclose(again(idx)[0], model(idx)[0], atol=1e-5)


def test_half_precision_weights_become_float32(folder):
    state = {name: p.half() for name, p in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    again = load(folder).state_dict()
    assert {p.dtype for p in again.values()} == {torch.float32}
    assert torch.equal(again["transformer.wte.weight"], state["transformer.wte.weight"].float())


# ---- what is refused: config.json ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),  # the exact one; GPT-2's is the tanh
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
    ],
)
def test_what_is_not_gpt2_is_refused_by_name(key, value, tmp_path):
    folder = save_huggingface(random_model(**SMALL), tmp_path, **{key: value})
    assert f"config.json: {key} is {value!r}" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("value", [None, 0, "x", 16.5])
def test_a_size_that_is_none_is_refused_by_name(key, value, tmp_path):
    folder = save_huggingface(random_model(**SMALL), tmp_path, **{key: value})
    assert re.search(rf"config\.json: .*({key}|block_size)", refusal(huggingface.load, folder))


@pytest.mark.parametrize("size", [dict(n_layer=10**6), dict(n_inner=10**9), dict(vocab_size=10**9)], ids=str)
def test_a_size_that_the_weights_do_not_have_is_refused_before_anything_is_built(size, tmp_path):
    """A download's config.json can name sizes that no memory holds."""
    folder = save_huggingface(random_model(**SMALL), tmp_path, **size)
    began = time.perf_counter()
    assert "model.safetensors does not fit its config.json" in refusal(huggingface.load, folder)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"model_type": "gpt2"}', "\x00", "[" * 100_000])
def test_a_config_that_is_none_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    assert re.search(r"config\.json: .{12,}", refusal(huggingface.load, folder))


# ---- what is refused: weights ----


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer.wte.weight", None),
        ("transformer.h.1.ln_2.bias", None),
        ("transformer.h.0.attn.c_attn.weight", torch.zeros(48, 16)),  # the transpose
        ("transformer.h.0.attn.c_attn.weight", torch.zeros(1, 16, 48)),
        ("transformer.wpe.weight", torch.zeros(13, 16)),
        ("transformer.wpe.weight", torch.zeros(12, 16, dtype=torch.int32)),
        ("score.weight", torch.zeros(2, 16)),  # a classifier's
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused_by_name(name, tensor, folder):
    change_weights(folder, **{name: tensor})
    assert re.search(rf"model\.safetensors does not fit.*{name}", refusal(huggingface.load, folder))


def test_weights_of_a_layer_too_many_are_refused(folder):
    change_weights(folder, **{"transformer.h.2.ln_1.weight": torch.zeros(16)})
    assert "n_layer=2, and there are weights of 3 blocks" in refusal(huggingface.load, folder)


def test_an_output_layer_that_is_not_the_embedding_is_refused(folder):
    """GPT-2 ties the two. Without the refusal the output layer would be dropped in silence."""
    wte = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change_weights(folder, **{"lm_head.weight": wte.clone()})
    load(folder)  # One that equals the embedding is a second copy of it.
    change_weights(folder, **{"lm_head.weight": wte + 1e-3})
    assert "lm_head.weight is not transformer.wte.weight" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_refused_by_name(file, folder):
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert file in refusal(huggingface.load, folder)
    (folder / file).unlink()
    assert f"has no {file}" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("kind", ["sharded", "pickled"])
def test_weights_in_another_layout_are_refused_with_a_remedy_that_works(kind, folder, tmp_path):
    wanted = load(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    if kind == "sharded":
        theirs.save_pretrained(tmp_path / "other", max_shard_size="5KB")
        assert (tmp_path / "other/model.safetensors.index.json").exists()
    else:
        theirs.config.save_pretrained(tmp_path / "other")
        torch.save(theirs.state_dict(), tmp_path / "other/pytorch_model.bin")
    says = refusal(huggingface.load, tmp_path / "other")
    assert "has no model.safetensors" in says
    (size,) = re.findall(r"save_pretrained\(FOLDER, max_shard_size='(\w+)'\)", says)
    GPT2LMHeadModel.from_pretrained(tmp_path / "other").save_pretrained(tmp_path / "mended", max_shard_size=size)
    assert same_bits(load(tmp_path / "mended").state_dict(), wanted.state_dict())


# ---- which tokenizer a folder has ----


def gpt2_vocab():
    return json.loads(tokenizer.gpt2_files()[0].read_text(encoding="utf-8"))


def write_vocab(folder, file, vocab):
    """A vocabulary as transformers keeps it in vocab.json, or inside tokenizer.json."""
    content = vocab if file == "vocab.json" else {"version": "1.0", "model": {"type": "BPE", "vocab": vocab}}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def of_gpt2s_size(tmp_path):
    """A folder of as many ids as GPT-2 has."""
    save_huggingface(random_model(vocab_size=50257, n_embd=4, n_layer=1), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_vocabulary_that_is_gpt2s_is_known(of_gpt2s_size, file, capsys):
    write_vocab(of_gpt2s_size, file, gpt2_vocab())
    assert huggingface.load(of_gpt2s_size)[1] == "gpt2"
    assert checkpoint.open_model(of_gpt2s_size).tokenizer == "gpt2"
    assert capsys.readouterr() == ("", "")  # It is known and not guessed by the number of ids.


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_vocabulary_of_as_many_ids_is_not_taken_for_gpt2s(of_gpt2s_size, file, script, monkeypatch):
    """GPT-2 in another language often has a vocabulary of its own and of the same size."""
    vocab = gpt2_vocab()
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    write_vocab(of_gpt2s_size, file, vocab)
    monkeypatch.chdir(of_gpt2s_size.parent)
    status, out, err = script("sample", "--init_from=hf", "--device=cpu")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and f"the {file} of hf is not GPT-2's" in err
    status, out, err = script("export", "--init_from=hf", "--hf_dir=again")
    assert status == 0 and "without tokenizer files" in out, err
    written = sorted(path.name for path in of_gpt2s_size.with_name("again").iterdir())
    assert written == ["config.json", "generation_config.json", "model.safetensors"]


def test_ids_alone_make_a_guess_that_is_said(of_gpt2s_size, capsys):
    assert huggingface.load(of_gpt2s_size)[1] == ""
    assert checkpoint.open_model(of_gpt2s_size).tokenizer == "gpt2"
    assert "by its 50,257 ids it is taken to have the tokenizer 'gpt2'" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"no JSON\n"])
def test_a_vocabulary_that_is_no_json_is_one_line(folder, file, content):
    (folder / file).write_bytes(content)
    assert f"{file} is not a vocabulary" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3}', '{"model": {}}', "null"])
def test_a_tokenizer_json_without_a_vocabulary_is_one_line(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json is not a vocabulary" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("spec", [3, ["gpt2"], "char:", "char:aa", "char:\ud800"])
def test_a_named_tokenizer_that_is_none_is_refused(spec, tmp_path):
    folder = save_huggingface(random_model(**SMALL), tmp_path, tokenizer_spec=spec)
    assert "config.json: " in refusal(huggingface.load, folder)


# ---- the hub's client ----


class HTTPStatusError(Exception):
    """An error as an HTTP library makes them: of several lines, and no OSError."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot send a request, as the client has been closed."),
        HTTPStatusError(
            "Client error '429 Too Many Requests'\nFor more information check: https://httpstatuses.com/429"
        ),
        OSError(28, "No space left on device"),
        ValueError(),
        AssertionError("x" * 10_000),
    ],
    ids=repr,
)
def test_whatever_the_hubs_client_raises_is_one_short_line(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for name in ("gpt2", "someone/else"):
        says = refusal(checkpoint.open_model, name)
        assert says.startswith(f"{name} cannot be had from the hub ({type(error).__name__}: ") and len(says) < 400
        assert "give a checkpoint or a folder" in says


def test_nothing_that_could_run_code_is_asked_for(monkeypatch, folder):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    huggingface.load("gpt2-large")
    ((repo, patterns),) = asked
    assert repo == "openai-community/gpt2-large"
    assert sorted(patterns) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.json"]
