"""lib/huggingface.py: folders in transformers' layout are read to the bit, or refused in a line that says why."""

import json
import math
import os
import re
import socket
import time

from lib import checkpoint, huggingface, tokenizer
from lib.assemble import Diverged, assemble
from model import GPTConfig

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


def test_dropout_is_that_of_the_model():
    theirs = GPT2Config(**huggingface.convert(random_model(**SMALL, dropout=0.3))[0])
    assert (theirs.embd_pdrop, theirs.attn_pdrop, theirs.resid_pdrop) == (0.3, 0.3, 0.3)


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


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"])
@pytest.mark.parametrize("value", [True, 10**30, -(10**30), 2**62, 2**48])
def test_a_size_beyond_all_bounds_is_one_line(key, value, tmp_path):
    folder = save_huggingface(random_model(**SMALL), tmp_path, **{key: value})
    refusal(huggingface.load, folder)


@pytest.mark.parametrize(
    "change",
    [
        *(dict(dropout=value) for value in (1, -0.1, math.nan, True, "0", None, 10**400)),
        *(dict(bias=value) for value in (0, 1, None, "True")),
        *(dict(n_embd=value) for value in (True, 16.0, 2**63, "16")),
    ],
    ids=str,
)
def test_a_config_of_other_kinds_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GPTConfig(**SMALL | change)


@pytest.mark.parametrize("dropout", [0, 0.0, 0.999])
def test_a_dropout_may_be_a_whole_number(dropout):
    assert GPTConfig(**SMALL, dropout=dropout).dropout == dropout


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


def test_a_weight_that_stands_there_under_two_names_is_refused(folder):
    wte = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change_weights(folder, **{"wte.weight": wte + 1})
    assert "holds transformer.wte.weight twice" in refusal(huggingface.load, folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    change_weights(folder, **{"transformer.ln_f.bias": torch.full((16,), value)})
    says = refusal(huggingface.load, folder)
    assert "model.safetensors: transformer.ln_f.bias is not finite: its training has diverged" in says
    change_weights(folder, **{"transformer.ln_f.bias": torch.full((16,), 3e38)})
    load(folder)  # Large weights are weights.


def test_an_embedding_that_is_not_finite_is_no_untied_one(folder):
    """NaN equals nothing, not even itself."""
    wte = torch.full((50, 16), math.nan)
    change_weights(folder, **{"transformer.wte.weight": wte, "lm_head.weight": wte.clone()})
    assert "is not finite" in refusal(huggingface.load, folder)


def test_a_weight_that_overflows_float32_is_not_finite():
    model = random_model(**SMALL)
    state = {name: p.double() for name, p in model.state_dict().items()}
    state["transformer.wpe.weight"][0, 0] = 1e300
    with pytest.raises(Diverged, match="transformer.wpe.weight"):
        assemble(model.config, state)


def nested(p):
    return torch.nested.nested_tensor([p[0], p[1, :1]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form",
    [
        *(lambda p, dtype=dtype: p.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)),
        lambda p: torch.quantize_per_tensor(p, 0.1, 0, torch.qint8),
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
        lambda p: p.to("meta"),
        torch._neg_view,
        nested,
    ],
)
def test_a_tensor_that_is_not_plain_is_refused_by_name(form):
    model = random_model(**SMALL)
    state = model.state_dict()
    with pytest.raises(ValueError, match="transformer.wpe.weight is of .* wanted is a plain tensor of floats"):
        assemble(model.config, state | {"transformer.wpe.weight": form(state["transformer.wpe.weight"])})


def test_weights_in_one_piece_of_memory_are_taken_apart(tmp_path):
    """Training would change the one with the other. A view of more would be saved with all that it views."""
    model = random_model(**SMALL)
    state = model.state_dict()
    one, two, part, expanded = (f"transformer.h.{i}.ln_{j}.weight" for i in range(2) for j in (1, 2))
    state[two] = state[one]
    state[part] = torch.randn(1000)[7:23]
    state[expanded] = torch.ones(1).expand(16)
    again = assemble(model.config, state)
    assert same_bits(again.state_dict(), state)
    parameters = list(again.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous() for p in parameters)
    assert again.lm_head.weight is again.transformer.wte.weight
    again.transformer.h[0].ln_1.weight.data.zero_()
    assert again.transformer.h[0].ln_2.weight.all()


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
    return json.loads(tokenizer.gpt2_files()[0])


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


def gpt2_files_with(**changes):
    """GPT-2's tokenizer in transformers' files, and tokenizer.json with these changes."""
    files = huggingface.tokenizer_files("gpt2")
    return files | {"tokenizer.json": files["tokenizer.json"] | changes}


def gpt2_model_with(**changes):
    return gpt2_files_with(model=gpt2_files_with()["tokenizer.json"]["model"] | changes)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def reversed_merges(as_pairs=False):
    model = huggingface.tokenizer_files("gpt2")["tokenizer.json"]["model"]
    merges = model["merges"][::-1]
    return {"model": model | {"merges": [merge.split(" ") for merge in merges] if as_pairs else merges}}


def merges_txt(step=1):
    return "\n".join(["#version: 0.2", *huggingface.tokenizer_files("gpt2")["merges.txt"].splitlines()[1:][::step], ""])


def another_vocab():
    return {token: -i % 50257 for token, i in gpt2_vocab().items()}


def token(id, content):
    return {"added_tokens": [{"id": id, "content": content}]}


def test_gpt2s_files_are_gpt2s_in_all_their_forms(of_gpt2s_size):
    """Files of the years 2019 to 2025: merges as pairs or as texts, a token for padding, a class of its own."""
    model = gpt2_files_with()["tokenizer.json"]["model"]
    pairs = {"model": model | {"merges": [merge.split(" ") for merge in model["merges"]], "dropout": None}}
    cut = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
    for files in (gpt2_files_with(), gpt2_files_with(**pairs), gpt2_files_with(**cut)):
        write_files(of_gpt2s_size, files)
        assert huggingface.load(of_gpt2s_size)[1] == "gpt2"
    write_files(of_gpt2s_size, gpt2_files_with(**token(50257, "[PAD]")) | {"added_tokens.json": {"[PAD]": 50257}})
    write_files(of_gpt2s_size, {"tokenizer_config.json": {"model_max_length": 1024}, "merges.txt": merges_txt()})
    assert huggingface.load(of_gpt2s_size)[1] == "gpt2"


CONTRADICTIONS = {
    "merges.txt in another order": lambda: {"merges.txt": merges_txt(-1)},
    "the same beside GPT-2's vocabulary": lambda: {"merges.txt": merges_txt(-1), "vocab.json": gpt2_vocab()},
    "a merge too few": lambda: {"merges.txt": merges_txt().rsplit("\n", 2)[0]},
    "merges of texts": lambda: gpt2_files_with(**reversed_merges()),
    "merges of pairs": lambda: gpt2_files_with(**reversed_merges(as_pairs=True)),
    "another tokenizer.json": lambda: gpt2_files_with(model={"type": "BPE", "vocab": another_vocab()}),
    "another kind of model": lambda: gpt2_files_with(model={"type": "WordPiece", "vocab": gpt2_vocab()}),
    "words and scores": lambda: {"tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}},
    "text in lower case": lambda: gpt2_files_with(normalizer={"type": "Lowercase"}),
    "another cut": lambda: gpt2_files_with(pre_tokenizer={"type": "Whitespace"}),
    "no cut": lambda: gpt2_files_with(pre_tokenizer=None),
    "a space before the text": lambda: gpt2_files_with(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    ),
    "no cut by words": lambda: gpt2_files_with(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    ),
    "a space by the settings": lambda: {"tokenizer_config.json": {"add_prefix_space": True}},
    "words before merges": lambda: gpt2_model_with(ignore_merges=True),
    "ends of words": lambda: gpt2_model_with(end_of_word_suffix="</w>"),
    "a token of another": lambda: gpt2_files_with(**token(464, "<s>")),
    "an end-of-text of another id": lambda: gpt2_files_with(**token(50257, "<|endoftext|>")),
    "an added one that is there": lambda: gpt2_files_with(**token(50257, "Hello")),
    "an added one in a file of its own": lambda: {"added_tokens.json": {"<s>": 464}},
    "an added one in the settings": lambda: {
        "tokenizer_config.json": {"added_tokens_decoder": {"464": {"content": "<s>"}}}
    },
    "another class": lambda: {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "pieces of sentences": lambda: {"spiece.model": "x"},
    "words": lambda: {"vocab.txt": "[PAD]\n"},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_file_that_contradicts_gpt2s_makes_the_tokenizer_unknown(of_gpt2s_size, name):
    """Whether config.json names GPT-2's tokenizer, as in every second case, or not."""
    if list(CONTRADICTIONS).index(name) % 2:
        hf = json.loads((of_gpt2s_size / "config.json").read_text())
        (of_gpt2s_size / "config.json").write_text(json.dumps(hf | {"tokenizer_spec": "gpt2"}))
    files = CONTRADICTIONS[name]()
    write_files(of_gpt2s_size, files)
    spec = huggingface.load(of_gpt2s_size)[1]
    assert spec.startswith(tokenizer.UNKNOWN) and spec.endswith(" is not GPT-2's")
    assert any(file in spec for file in files)


def test_a_class_named_in_config_json_is_evidence(tmp_path):
    """Chinese GPT-2s name BERT's there."""
    folder = save_huggingface(random_model(**SMALL), tmp_path, tokenizer_class="BertTokenizer")
    assert "the tokenizer_class of" in huggingface.load(folder)[1]


def test_a_local_folder_of_the_name_gpt2_is_looked_at(of_gpt2s_size, monkeypatch):
    monkeypatch.chdir(of_gpt2s_size.parent)
    of_gpt2s_size.rename("gpt2")
    write_vocab(of_gpt2s_size.with_name("gpt2"), "vocab.json", another_vocab())
    assert huggingface.load("gpt2")[1] == f"{tokenizer.UNKNOWN}the vocab.json of gpt2 is not GPT-2's"


@pytest.mark.parametrize(("spec", "other"), [("bytes", "char:" + "".join(map(chr, range(50)))), ("char:ab", "char:ba")])
def test_the_files_of_another_tokenizer_contradict_the_name_of_ours(spec, other, folder):
    hf = json.loads((folder / "config.json").read_text()) | {"tokenizer_spec": spec}
    (folder / "config.json").write_text(json.dumps(hf))
    write_files(folder, huggingface.tokenizer_files(spec))
    assert huggingface.load(folder)[1] == spec
    write_files(folder, huggingface.tokenizer_files(other))
    assert huggingface.load(folder)[1].startswith(f"{tokenizer.UNKNOWN}the tokenizer.json of ")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
@pytest.mark.parametrize("file", huggingface.VOCABULARIES)
def test_evidence_that_is_no_regular_file_is_refused(folder, file, kind):
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("nowhere", path)}
    make[kind](folder / file)
    assert f"{file} is not a regular file" in refusal(huggingface.load, folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((file, content) for file in ("added_tokens.json", "tokenizer_config.json") for content in ("[]", "{", "3")),
        ("added_tokens.json", '{"[PAD]": "b"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}'),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": [3]}}'),
    ],
)
def test_damaged_evidence_is_one_line(folder, file, content):
    (folder / file).write_text(content)
    assert f"{file} is not a vocabulary" in refusal(huggingface.load, folder)


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
    weights_and_texts = {"config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"}
    weights_and_texts |= {"tokenizer_config.json", "added_tokens.json", "vocab.txt", "bpe.codes"}
    # The presence of these says that the tokenizer is another. They are not read.
    not_read = {"spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model"}
    assert set(patterns) == weights_and_texts | not_read


# ---- a hub that never answers ----


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A server that accepts connections and never sends a byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface, "SILENCE", 0.3)
        yield url


def test_a_hub_that_never_answers_is_said_and_left(silent_hub, script):
    began = time.perf_counter()
    status, out, err = script("sample", "--init_from=gpt2")
    assert (status, out, time.perf_counter() - began < 10) == (2, "", True)
    fetching, line = err.splitlines()
    assert fetching == "fetching openai-community/gpt2 from the hub"
    assert line.startswith("sample.py: gpt2 cannot be had from the hub (TimeoutError: no byte came in 0.3 seconds)")


def test_one_process_of_many_says_that_it_fetches(silent_hub, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    refusal(huggingface.load, "gpt2")
    assert capsys.readouterr() == ("", "")


def test_a_slow_hub_is_waited_for_while_bytes_come(monkeypatch, tmp_path, folder):
    blobs = tmp_path / "hub/models--openai-community--gpt2/blobs"

    def download(repo, allow_patterns):
        blobs.mkdir(parents=True)
        for _ in range(8):
            with open(blobs / "0.incomplete", "ab") as f:
                f.write(b"a byte and more")
            time.sleep(0.1)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface, "SILENCE", 0.3)
    assert huggingface.load("gpt2")[1] == "gpt2"


@pytest.mark.parametrize("variable", ["HF_HUB_DOWNLOAD_TIMEOUT=x", "HF_ENDPOINT=http://127.0.0.1:99999"])
def test_an_environment_that_the_hubs_client_can_not_read_is_one_line(variable, new_client, monkeypatch, script):
    for name, value in ("HF_HUB_OFFLINE", "0"), variable.split("=", 1):
        monkeypatch.setenv(name, value)
    status, out, err = script("sample", "--init_from=gpt2")
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("sample.py: gpt2 cannot be had from the hub (ValueError: ")
