"""Published weights from a hub, over the loopback: fine-tuning, sampling and evaluation start from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hub import Hub
from safetensors.torch import save

import checkpoint
import train as train_py
from model import GPT, GPTConfig

ROOT = Path(train_py.__file__).parent


@pytest.fixture
def published():
    """A tiny GPT-2 as the hub holds the real ones: names without `transformer.`, masks beside the weights."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16))
    config, state = model.to_huggingface()
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}
    return model, files | {"pytorch_model.bin": b"a pickle that nobody should fetch"}


def run(hub, tmp_path, script, *args):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)


def test_fine_tuning_starts_from_published_weights_and_fetches_no_pickle(corpus, tmp_path, published):
    model, files = published
    with Hub({"openai-community/gpt2": files}) as hub:
        args = [*TINY, "--init_from=gpt2", "--out_dir=out/ft", "--max_iters=2", "--block_size=32", "--dropout=0"]
        first = run(hub, tmp_path, "train.py", *args, "--learning_rate=0", "--min_lr=0")
        assert first.returncode == 0, first.stderr
        assert "starting from gpt2" in first.stdout
        assert not any("bin" in answer for answer in hub.answers)
        assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
        sampled = run(hub, tmp_path, "sample.py", "--init_from=gpt2", "--max_new_tokens=5", "--device=cpu")
        assert sampled.returncode == 0, sampled.stderr
    trained = checkpoint.open_model("out/ft/final.pt").model
    for a, b in zip(trained.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # at a rate of 0 they are what was published


@pytest.mark.parametrize("fault", ["no such name", "no safetensors", "unreachable"])
def test_a_hub_without_the_model_is_one_line(corpus, tmp_path, published, fault):
    _, files = published
    files = {"config.json": files["config.json"]} if fault == "no safetensors" else files
    with Hub({"openai-community/gpt2": files}) as hub:
        if fault == "unreachable":
            hub.url = "http://127.0.0.1:9"
        name = "someone/else" if fault == "no such name" else "gpt2"
        done = run(hub, tmp_path, "sample.py", f"--init_from={name}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert f"{name} cannot be opened" in done.stderr.splitlines()[-1]
