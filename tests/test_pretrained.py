"""Published weights come from a hub on the loopback: fine-tuning, sampling and evaluation start from them."""

import json

from lib import huggingface, tokenizer

import pytest
import torch
from conftest import TINY, random_model, same_bits, weights, write_corpus
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import save


@pytest.fixture(scope="module")
def published():
    """(state dict, files) of a tiny GPT-2 as the hub holds the real ones.

    The names do not begin with `transformer.`, and the causal masks stand beside the weights.
    """
    model = random_model(block_size=32, vocab_size=50257, n_embd=4)
    config, state = huggingface.convert(model)
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}
    return model.state_dict(), files | {"pytorch_model.bin": b"a pickle that nobody should fetch"}


@pytest.fixture
def use(monkeypatch, tmp_path):
    """use(url) makes this process take the hub's files from there, and without an url from its cache alone."""

    def use(url=""):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not url)

    return use


def test_training_sampling_and_evaluation_start_from_published_weights(corpus, script, use, published):
    state, files = published
    write_corpus("pages", tokenizer.load("gpt2"))
    with Hub({"openai-community/gpt2": files}) as hub:
        use(hub.url)
        shape = ["--block_size=32", "--n_embd=4", "--dropout=0"]
        rate = ["--learning_rate=0", "--min_lr=0", "--max_iters=2"]
        status, out, err = script(
            "train", *TINY, "--dataset=pages", "--init_from=gpt2", *shape, *rate, "--out_dir=out/a"
        )
        assert status == 0 and "starting from gpt2" in out, err
        status, _, err = script("sample", "--init_from=gpt2", "--max_new_tokens=5", "--device=cpu")
        assert status == 0 and "gpt2: step 0" in err
        status, out, err = script("eval", "--init_from=gpt2", "--dataset=pages", "--protocol=stream", "--device=cpu")
        assert status == 0 and "pages, test split, gpt2" in out, err
    assert same_bits(weights("out/a/final.pt"), state)  # At a rate of 0 they are what was published.


def test_no_pickle_is_fetched_and_what_was_fetched_needs_no_network(
    script, new_client, monkeypatch, tmp_path, published
):
    """The environment names the hub, as a user's does."""
    args = ["--init_from=gpt2", "--max_new_tokens=5", "--device=cpu"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with Hub({"openai-community/gpt2": published[1]}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        status, first, err = script("sample", *args)
        assert status == 0, err
        assert sum(answer.startswith("resolve GET") for answer in hub.answers) == len(huggingface.FILES)
    assert sorted(path.name for path in new_client.rglob("*") if path.is_symlink()) == [*huggingface.FILES]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = script("sample", *args)
    assert (status, out) == (0, first), err


@pytest.mark.parametrize(
    ("name", "fault"),
    [("someone/else", "no such name"), ("gpt2", "no safetensors"), ("gpt2", "unreachable"), ("gpt2", "an error")],
)
def test_a_hub_without_the_model_is_one_line(corpus, script, use, published, name, fault):
    files = {k: v for k, v in published[1].items() if fault != "no safetensors" or k == "config.json"}
    with Hub({"openai-community/gpt2": files}) as hub:
        hub.faults = {"model.safetensors": [500] * 9} if fault == "an error" else {}
        use("http://127.0.0.1:9" if fault == "unreachable" else hub.url)
        status, out, err = script("sample", f"--init_from={name}")
    assert (status, out) == (2, "")
    says = "has no model.safetensors" if fault == "no safetensors" else "cannot be had from the hub"
    assert err.splitlines()[-1].startswith(f"sample.py: {name} {says}")
