"""export.py: transformers opens, computes and tokenizes what our scripts do, and the way back is exact to the bit."""

import errno
import json
import math
import os
import stat
from pathlib import Path

import export
import sample
from lib import checkpoint, huggingface, tokenizer

import numpy as np
import pytest
import torch
from conftest import random_model, save_huggingface, save_nanogpt_run, save_run, write_meta_pkl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

CHARS = "\n !',.:abcdefghijklmnopqrstuvwxyz\u00e9\U0001f600"
odd_text = st.lists(
    st.text(max_size=6) | st.sampled_from(["<|endoftext|>", " the", "\n\n", "  ", "é", "漢", "😀", "'s"])
)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def varied_model(**shape):
    """A random model whose greedy text varies, since its positions count most."""
    model = random_model(**dict(block_size=32) | shape)
    torch.nn.init.normal_(model.transformer.wpe.weight, std=2.0)
    return model


def open_in_transformers(folder="hf"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def exported(script):
    """exported(args...) runs export.py into hf/ and returns what it prints."""

    def exported(*args):
        status, out, err = script("export", "--hf_dir=hf", *args)
        assert status == 0, err
        assert not list(Path().glob(".*.partial"))
        return out

    return exported


@pytest.mark.parametrize("shape", [{}, {"bias": False}, {"n_inner": 24}, {"vocab_size": 50257, "n_embd": 4}])
def test_transformers_computes_our_logits_and_the_way_back_is_exact(exported, shape):
    model = varied_model(**shape)
    save_run(model, tokenizer="gpt2" if "vocab_size" in shape else "bytes")
    exported()
    theirs, _ = open_in_transformers()
    ids = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0], rtol=1e-5, atol=1e-5)
    back = checkpoint.open_model("hf")
    state, n_biases = back.model.state_dict(), 0
    for name, p in model.state_dict().items():
        assert torch.equal(state.pop(name), p)
    for name, p in state.items():
        n_biases += 1
        assert name.endswith("bias") and not p.any()
    assert bool(n_biases) == ("bias" in shape)
    assert back.tokenizer == ("gpt2" if "vocab_size" in shape else "bytes")
    assert back.model.config.n_inner == shape.get("n_inner", 0)


@pytest.mark.parametrize("spec", ["gpt2", "bytes"])
def test_the_tokenizer_gives_our_ids_for_any_text(spec, tmp_path):
    from transformers import AutoTokenizer

    tok = tokenizer.load(spec)
    contents = huggingface.tokenizer_files(spec) | {"config.json": {"model_type": "gpt2"}}
    export.write_folder(tmp_path / "hf", contents, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (tok.eot, tok.eot, tok.vocab_size)

    @settings(max_examples=150, deadline=None, database=None)
    @given(text=odd_text.map("".join))
    def same(text):
        ids = sample.encode_prompt(text, tok) if text else []
        assert theirs.encode(text, add_special_tokens=False) == theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text

    same()
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))  # all but the surrogates
    for text in (every[i : i + 5000] for i in range(0, len(every), 40_000)):
        assert theirs.encode(text) == tok.encode(text).tolist()


@pytest.mark.parametrize("spec", ["gpt2", "bytes"])
def test_greedy_text_is_that_of_sample_py(exported, script, spec):
    tok = tokenizer.load(spec)
    save_run(varied_model(vocab_size=tok.vocab_size), tokenizer=spec)
    exported()
    theirs, their_tok = open_in_transformers()
    for prompt in ("The end", "Über\n\n", "a <|endoftext|> b"):
        ids = their_tok(prompt, return_tensors="pt").input_ids
        new = 32 - ids.size(1)
        expected = theirs.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.size(1) :].tolist()
        drawn = checkpoint.open_model("hf").model.generate(ids, new, temperature=0, eot=tok.eot)
        assert [int(i) for i in drawn] == expected and len(set(expected)) > 3
        for source in ("--out_dir=out/a", "--init_from=hf"):
            status, out, _ = script("sample", source, f"--start={prompt}", "--temperature=0", f"--max_new_tokens={new}")
            written = [i for i in expected if i != tok.eot]
            assert status == 0 and out == prompt + tok.decode(written).decode("utf-8", "replace") + "\n"


def test_generation_stops_at_end_of_text_and_needs_no_further_setting(exported):
    save_run(varied_model())
    exported()
    theirs, their_tok = open_in_transformers()
    for g in (theirs.generation_config, their_tok):
        assert (g.bos_token_id, g.eos_token_id, g.pad_token_id) == (256, 256, 256)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_surplus_rows_are_left_out(exported, prefix):
    model = varied_model(vocab_size=50304, n_embd=4, bias=False)
    save_nanogpt_run(model, "openwebtext", prefix)
    assert "47 rows" in exported()
    state = load_file("hf/model.safetensors")
    assert torch.equal(state["transformer.wte.weight"], model.lm_head.weight[:50257])
    assert json.loads(Path("hf/config.json").read_text())["vocab_size"] == 50257
    theirs, tok = open_in_transformers()
    ids = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0][..., :50257], rtol=1e-5, atol=1e-5)
    assert tok.encode("Hello world") == [15496, 995]


def test_a_character_model_has_its_characters(exported, script):
    write_meta_pkl("data/letters", CHARS)
    save_nanogpt_run(varied_model(vocab_size=len(CHARS)), "letters")
    exported()
    theirs, tok = open_in_transformers()
    text = "\nit was: é, a \U0001f600!"
    ids = tokenizer.CharTokenizer(CHARS).encode(text).tolist()
    assert tok.encode(text) == ids and tok.decode(ids) == text
    assert theirs.generation_config.eos_token_id is None
    outs = [script("sample", f"--init_from={f}", "--temperature=0", "--start=a")[1] for f in ("out/a", "hf")]
    assert outs[0] == outs[1] and len(outs[0]) > 100


def test_a_model_whose_tokenizer_is_not_known_goes_without(exported):
    save_nanogpt_run(varied_model(vocab_size=65), "letters")
    assert "data/letters/meta.pkl of its training names; put it back" in exported()
    assert sorted(os.listdir("hf")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert checkpoint.open_model("hf").model.config.vocab_size == 65


def test_a_nanogpt_run_is_trained_on_sampled_and_evaluated(script):
    """It has characters and no biases, as nanoGPT's Shakespeare run. What our training makes of it is used again."""
    write_meta_pkl("data/letters", CHARS)
    ids = np.random.default_rng(0).integers(len(CHARS), size=900)
    for split in ("train", "val"):
        ids.astype(np.uint16).tofile(f"data/letters/{split}.bin")
    model = varied_model(vocab_size=len(CHARS), bias=False)
    save_nanogpt_run(model, "letters")
    options = ["--dataset=letters", "--max_iters=3", "--batch_size=2", "--gradient_accumulation_steps=1"]
    options += ["--device=cpu", "--compile=False", "--block_size=32", "--out_dir=out/b"]
    status, out, err = script("train", "--init_from=out/a/ckpt.pt", *options)
    assert status == 0, err
    ours = torch.load("out/b/ckpt.pt", weights_only=True)
    assert ours["model"].keys() == model.state_dict().keys()  # nanoGPT strips a prefix and needs none.
    assert ours["model_args"] == checkpoint.weights(model)["model_args"]
    for source in ("out/a", "out/b"):
        assert script("sample", f"--out_dir={source}", "--max_new_tokens=5")[0] == 0
        status, out, err = script("eval", f"--out_dir={source}", "--device=cpu")
        assert status == 0 and "899" in out, err


def test_a_link_to_an_empty_folder_is_written_behind(script):
    save_run(varied_model())
    Path("disk").mkdir()
    Path("hf").symlink_to("disk")
    assert script("export", "--hf_dir=hf")[0] == 0
    assert Path("disk/model.safetensors").exists() and Path("hf").is_symlink()


def test_a_mount_point_is_written_into_and_config_json_comes_last(script, monkeypatch):
    """Nothing can be renamed to the name of a mount point."""
    save_run(varied_model())
    Path("hf").mkdir()
    replace, placed = os.replace, []

    def replace_no_mount_point(source, target):
        if Path(target) == Path("hf").resolve():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
        placed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_no_mount_point)
    status, _, err = script("export", "--hf_dir=hf")
    assert status == 0, err
    assert placed[-1] == "config.json" and sorted(placed) == sorted(os.listdir("hf"))
    assert checkpoint.open_model("hf").tokenizer == "bytes"


def test_two_exports_into_one_empty_folder_do_not_mix(script, monkeypatch):
    save_run(varied_model())
    Path("hf").mkdir()

    def save_while_another_comes(state, path, metadata):
        save_file(state, path, metadata=metadata)
        Path("hf/config.json").write_text("{}")

    monkeypatch.setattr(export, "save_file", save_while_another_comes)
    status, _, err = script("export", "--hf_dir=hf")
    assert status == 2 and "not empty" in err and len(err.splitlines()) == 1
    assert os.listdir("hf") == ["config.json"]


@pytest.mark.parametrize("folder", ["hf", "hf/mine"])
def test_a_link_to_a_disk_that_is_not_mounted_is_refused(script, monkeypatch, folder):
    save_run(varied_model())
    Path("hf").symlink_to("disk")
    monkeypatch.setattr(checkpoint, "open_run", lambda *args: pytest.fail("the work has begun"))
    status, _, err = script("export", f"--hf_dir={folder}")
    assert status == 2 and "is a link to what is not there; mount its disk" in err and len(err.splitlines()) == 1
    assert not Path("disk").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", ["a run", "a Hugging Face folder"])
def test_weights_that_have_diverged_are_not_exported(script, source, value):
    model = varied_model()
    model.transformer.wpe.weight.data[3, 2] = value
    save_run(model) if source == "a run" else save_huggingface(model, "theirs")
    status, _, err = script("export", "--hf_dir=hf", *(["--init_from=theirs"] if source != "a run" else []))
    assert status == 2 and "transformer.wpe.weight is not finite: its training has diverged" in err
    assert len(err.splitlines()) == 1 and not Path("hf").exists()


@pytest.mark.parametrize("spec", ["gpt2", "bytes", "char:" + CHARS])
def test_what_transformers_makes_of_our_tokenizer_is_known_again(spec, tmp_path):
    """transformers writes the files in its own words."""
    from transformers import AutoTokenizer

    model = varied_model(vocab_size=tokenizer.vocab_size_of(spec), n_embd=4)
    save_huggingface(model, "hf", tokenizer_spec=spec)
    for name, content in huggingface.tokenizer_files(spec).items():
        Path("hf", name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert huggingface.load("hf")[1] == spec
    AutoTokenizer.from_pretrained("hf").save_pretrained("hf")
    assert huggingface.load("hf")[1] == spec


def test_why_the_tokenizer_is_not_known_is_kept(exported):
    """By their number the ids of an export would otherwise be taken for bytes."""
    save_huggingface(varied_model(), "theirs")
    Path("theirs/spiece.model").touch()
    says = checkpoint.open_model("theirs").tokenizer
    assert says == f"{tokenizer.UNKNOWN}the spiece.model of theirs is not GPT-2's"
    assert "without tokenizer files" in exported("--init_from=theirs")
    assert checkpoint.open_model("hf").tokenizer == says


def test_a_folder_that_holds_something_is_not_touched(script):
    save_run(varied_model())
    Path("hf").mkdir()
    assert script("export", "--hf_dir=hf")[0] == 0
    before = {p.name: p.read_bytes() for p in Path("hf").iterdir()}
    status, _, err = script("export", "--hf_dir=hf")
    assert status == 2 and "holds something already" in err and len(err.splitlines()) == 1
    assert before == {p.name: p.read_bytes() for p in Path("hf").iterdir()}
    status, _, err = script("export")
    assert status == 2 and "--hf_dir=FOLDER" in err and len(err.splitlines()) == 1


def test_the_config_file_of_a_training_names_the_run_and_not_what_it_began_with(script):
    save_run(varied_model())
    Path("run.py").write_text('out_dir = "out/a"\ninit_from = "gpt2"\nlearning_rate = 1e-4\n')
    status, out, err = script("export", "run.py", "--hf_dir=hf")
    assert status == 0 and out.startswith("out/a/ckpt.pt -> hf"), err


def test_folder_and_files_have_the_permissions_of_new_ones(exported):
    """The libraries that make them would give them to their owner alone."""
    save_run(varied_model())
    before = os.umask(0o027)
    try:
        exported()
    finally:
        os.umask(before)
    assert stat.filemode(Path("hf").stat().st_mode) == "drwxr-x---"
    assert {stat.filemode(path.stat().st_mode) for path in Path("hf").iterdir()} == {"-rw-r-----"}


def test_an_export_that_fails_leaves_no_folder(script, monkeypatch):
    save_run(varied_model())

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    status, _, err = script("export", "--hf_dir=hf")
    assert status == 2 and "No space left" in err
    assert sorted(os.listdir()) == ["out"]


def test_a_name_that_says_nothing_true_is_refused(exported, script):
    """A folder from elsewhere may name any tokenizer."""
    save_run(varied_model())
    exported()
    settings = json.loads(Path("hf/config.json").read_text()) | {"tokenizer_spec": "wordpiece"}
    Path("hf/config.json").write_text(json.dumps(settings))
    status, _, err = script("sample", "--init_from=hf")
    assert status == 2 and "tokenizer 'wordpiece' is unknown" in err and len(err.splitlines()) == 1
