"""Datasets, the batch of a step and evaluation windows, against slow ways to the same and against properties."""

import gzip
import hashlib
import io
import itertools
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

from lib import data, prepare, tokenizer

import numpy as np
import pytest
from conftest import refusal, write_meta_pkl
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None, database=None)


@pytest.fixture(scope="module")
def gpt2():
    return tokenizer.Gpt2Tokenizer()


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(documents, name="d", tok=None, **options):
    """Write [(split, text)] by prepare.write, with one piece for each document."""
    return prepare.write(name, tok or tokenizer.BytesTokenizer(), ((s, t, True) for s, t in documents), 1, **options)


# ---- reading ----


def nanogpt_folder(ids, name="n", split="train", dtype="<u2"):
    Path("data", name).mkdir(parents=True, exist_ok=True)
    np.array(ids, dtype).tofile(f"data/{name}/{split}.bin")


def test_a_nanogpt_folder_holds_gpt2_ids(cwd, gpt2):
    nanogpt_folder([50256, 15496, 995, 50256, 0])
    dataset = data.Dataset("n")
    assert (dataset.tokenizer_spec, dataset.vocab_size, dataset.eot) == ("gpt2", gpt2.vocab_size, gpt2.eot)
    assert dataset.splits == {"train": dict.fromkeys((*data.COUNTS, "sha256"))}
    assert dataset.tokens("train").tolist() == [50256, 15496, 995, 50256, 0]
    assert dataset.text_ids("train").tolist() == [15496, 995, 0]
    assert dataset.verify("train") == hashlib.sha256(Path("data/n/train.bin").read_bytes()).hexdigest()


def test_a_nanogpt_folder_with_a_meta_pkl_holds_characters(cwd):
    text = "to be, or not\nto be"
    stoi = write_meta_pkl("data/n", sorted(set(text)))
    nanogpt_folder([stoi[c] for c in text])
    dataset = data.Dataset("n")
    assert dataset.vocab_size == len(stoi)
    assert tokenizer.load(dataset.tokenizer_spec).decode(dataset.text_ids("train")) == text.encode()
    assert dataset.verify("train")
    assert tokenizer.nanogpt_spec("n") == dataset.tokenizer_spec
    assert tokenizer.nanogpt_spec("other") == tokenizer.nanogpt_spec("") == "gpt2"


def test_a_missing_dataset_is_named_beside_those_there_are(cwd):
    assert "none yet" in refusal(data.Dataset, "books")
    nanogpt_folder([1], "alpha")
    write([("train", "some text")], name="beta")
    Path("data/empty").mkdir()
    message = refusal(data.Dataset, "books")
    assert "books" in message
    assert "alpha, beta)" in message
    assert "prepare_text.py" in message


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("books", "books"),
        ("my books", "'my books'"),
        ("a;b", "'a;b'"),
        ("it's", "'it'\"'\"'s'"),
        ("a\nb", "NAME"),
        ("a\0b", "NAME"),
        ("a\x1b[0mb", "NAME"),
        ("", "NAME"),
        ("../a", "NAME"),
        ("a/b", "NAME"),  # prepare_text.py takes no such name
        (".a", "NAME"),
    ],
)
def test_the_command_that_makes_a_missing_dataset_can_be_pasted(cwd, name, written):
    assert f"`python prepare_text.py FILES --dataset={written}` makes" in refusal(data.Dataset, name)


def test_a_missing_split_is_named_beside_those_there_are(cwd):
    write([("train", "some text")])
    assert "no val split (there: train)" in refusal(data.Dataset("d").tokens, "val")
    Path("data/d/train.bin").unlink()
    assert "no train split (there: none)" in refusal(data.Dataset("d").tokens, "train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: b"", "0 bytes long"),
        (lambda content: content[:-1], "2-byte"),
        (lambda content: content[:-2], "meta.json says 10"),
        (lambda content: content + b"\0\0", "holds 11 ids"),
        (lambda content: content[:-2] + b"\0\0", "not the file that meta.json describes"),
        (lambda content: content[:-2] + b"\1\1", "the id 257, beyond the vocabulary of 257"),
    ],
)
def test_a_token_file_that_is_not_what_meta_says_is_refused(cwd, change, says):
    write([("train", "some text"), ("val", "whole")])
    path = Path("data/d/train.bin")
    path.write_bytes(change(path.read_bytes()))
    message = refusal(data.Dataset("d").verify, "train")
    assert says in message
    assert "train.bin" in message
    assert data.Dataset("d").verify("val")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_nanogpt_file_of_half_an_id_or_none_is_refused(cwd, size):
    nanogpt_folder([1])
    Path("data/n/train.bin").write_bytes(b"\0" * size)
    assert f"{size} bytes" in refusal(data.Dataset("n").tokens, "train")


def test_a_nanogpt_id_beyond_the_vocabulary_is_refused(cwd):
    nanogpt_folder([1, 50257, 2])
    assert "50,257" in refusal(data.Dataset("n").verify, "train")


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8"])
@pytest.mark.parametrize("ids", [[50256, 15496, 995, 50256, 0], [0, 0, 7, 8], [5, 6]])
def test_a_file_of_wider_ids_without_a_meta_json_is_refused(cwd, dtype, ids):
    nanogpt_folder(ids * 4, dtype=dtype)
    assert "ids of four bytes or more" in refusal(data.Dataset("n").verify, "train")


@pytest.mark.parametrize(
    "ids",
    [[7], [7, 0], [0] * 8, [15496, 0, 995, 0, 11, 0, 0, 1], [0, 5, 0, 6]]
    + [[5, 0, 6, 0, 7, 0, 8], [7, 0] * 7, [15496] + [0] * 99, [30000] * 99, [18176] * 99, list(range(99))],
)
def test_a_file_of_uint16_ids_is_not_taken_for_wider_ones(cwd, ids):
    nanogpt_folder(ids)
    assert data.Dataset("n").verify("train")
    assert data.Dataset("n").text_ids("train").tolist() == ids


PROSE = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.\n" * 9


def saved(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


def of_type(dtype, is_char=False):
    def content(tok):
        return np.array(
            [" abcdefghijklmnopqrstuvwxyz".find(c) + 1 for c in PROSE] if is_char else tok.encode(PROSE), dtype
        )

    return content


LLM_C = "begins with llm.c's header, which tail -c +1025 OLD > NEW leaves out"
OTHER_CONTENT = {
    **{dtype: (of_type(dtype), "four bytes") for dtype in (">i4", "<i8", ">i8")},
    **{f"{order}f{n}": (of_type(f"{order}f{n}"), f"float{8 * n} numbers") for n in (2, 4, 8) for order in "<>"},
    "big-endian": (of_type(">u2"), "big-endian"),
    "big-endian characters": (of_type(">u2", is_char=True), "big-endian"),
    "float32 characters": (of_type("<f4", is_char=True), "float32 numbers"),
    "text": (lambda tok: PROSE.encode(), "is text"),
    "text of few characters": (lambda tok: "né 漢字 and the rest of it ☃ at length".encode(), "is text"),
    "text with a stray byte": (lambda tok: (PROSE * 9).replace("dark", "d\x01rk", 1).encode(), "is text"),
    "text of UTF-16": (lambda tok: PROSE.encode("utf-16"), "is text"),
    "npy": (lambda tok: saved(np.save, of_type("<u2")(tok)), ".npy"),
    "npz": (lambda tok: saved(np.savez, of_type("<u2")(tok)), "zip"),
    "gzip": (lambda tok: gzip.compress(of_type("<u2")(tok).tobytes(), mtime=0), "gzip"),
    "llm.c": (
        lambda tok: np.array([20240520, 1, 900] + [0] * 253, "<i4").tobytes() + tok.encode(PROSE).tobytes(),
        LLM_C,
    ),
    "parquet": (lambda tok: b"PAR1" + of_type("<u2")(tok).tobytes() + b"PAR1", "Parquet"),
}


@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_a_file_without_a_meta_json_that_holds_no_uint16_ids_is_recognised(cwd, gpt2, name):
    content, says = OTHER_CONTENT[name]
    content = bytes(content(gpt2))
    nanogpt_folder([1])
    Path("data/n/train.bin").write_bytes(content[: len(content) // 2 * 2])
    message = refusal(data.Dataset("n").verify, "train")
    assert says in message and "train.bin" in message and "must hold uint16 ids" in message


def test_other_content_is_recognised_after_zeros(cwd):
    nanogpt_folder([0] * 100_000 + [50256, 15496, 995] * 9, dtype="<f4")
    assert "float32" in refusal(data.Dataset("n").verify, "train")


ids_of = st.sampled_from([2, 4, 65, 257, 6000, 50257]).flatmap(
    lambda top: st.lists(st.integers(0, top - 1), min_size=16, max_size=99).map(lambda ids: (top, ids))
)


@settings(quick, max_examples=300)
@given(drawn=ids_of, seed=st.integers(0, 2**32))
def test_random_uint16_ids_raise_no_alarm(drawn, seed):
    top, ids = drawn
    for tokens in (np.random.default_rng(seed).integers(0, top, len(ids)), [*ids, 1, 257 % top, 1, 0, 1]):
        assert data.what_else(np.array(tokens, "<u2"), top) == ""


def test_real_uint16_ids_raise_no_alarm(gpt2):
    tokens = gpt2.encode(Path(data.__file__).read_text() + PROSE).astype("<u2")
    for i in range(len(tokens) - 16):
        assert data.what_else(tokens[i : i + 16], 50257) == ""
    assert data.what_else(of_type("<u2", is_char=True)(gpt2), 28) == ""


def dangling(path):
    path.symlink_to("/nowhere/file")


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("kind", [dangling, loop, Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("file", ["meta.json", "meta.pkl", "train.bin", "val.bin", "val_lm_eval.bin"])
def test_what_has_the_name_of_a_file_and_is_none_is_refused(cwd, kind, file):
    for split in ("train", "val"):
        nanogpt_folder([1, 2, 3], split=split)
    path = Path("data/n", file)
    path.unlink(missing_ok=True)
    kind(path)
    assert f"{path} is a link that leads nowhere, a folder or a pipe" in refusal(data.Dataset, "n")


def test_a_link_to_a_file_is_the_file(cwd):
    nanogpt_folder([1, 2, 3], "m")
    Path("data/n").mkdir()
    Path("data/n/train.bin").symlink_to(Path("data/m/train.bin").absolute())
    assert data.Dataset("n").verify("train")


GOOD_META = {
    "tokenizer": "bytes",
    "vocab_size": 257,
    "dtype": "uint16",
    "splits": {"train": dict.fromkeys(data.COUNTS)},
}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "{}", "\xff"]
    + [json.dumps({k: v for k, v in GOOD_META.items() if k != missing}) for missing in GOOD_META]
    + [
        json.dumps(GOOD_META | {"dtype": dtype})
        for dtype in ("float16", "int16", "uint17", "uint8", "(1,)u2,", None, 5, [])
    ]
    + [json.dumps(GOOD_META | {"splits": splits}) for splits in ([1], {"train": {}}, {"train": []}, {"train": None})]
    + [
        json.dumps(GOOD_META | {"splits": {"train": dict.fromkeys(data.COUNTS, value)}})
        for value in (-1, "7", [], 10**400)
    ]
    + [json.dumps(GOOD_META | {"vocab_size": size}) for size in (None, "many", [])],
)
def test_a_broken_meta_json_is_refused(cwd, text):
    nanogpt_folder([1, 2, 3])
    Path("data/n/meta.json").write_text(json.dumps(GOOD_META))
    assert data.Dataset("n").verify("train")
    Path("data/n/meta.json").write_bytes(text.encode("latin-1"))
    assert "meta.json" in refusal(data.Dataset, "n")


@pytest.mark.parametrize(("chars", "vocab_size"), [("", 257), ("aba", 3), ("a\ud800", 2), ("abc", 2)])
def test_characters_that_are_no_vocabulary_are_refused(cwd, chars, vocab_size):
    nanogpt_folder([0, 1])
    path = Path("data/n/meta.json")
    path.write_text(json.dumps(GOOD_META | {"tokenizer": "char:ab", "vocab_size": 2}))
    assert data.Dataset("n").verify("train")
    path.write_text(json.dumps(GOOD_META | {"tokenizer": f"char:{chars}", "vocab_size": vocab_size}))
    assert "meta.json" in refusal(data.Dataset, "n")


@pytest.mark.parametrize("unknown", data.COUNTS)
def test_a_count_that_is_not_known_is_null(cwd, unknown):
    write([("train", "some text")])
    meta = json.loads(Path("data/d/meta.json").read_text())
    meta["splits"]["train"][unknown] = None
    Path("data/d/meta.json").write_text(json.dumps(meta))
    assert data.Dataset("d").verify("train")
    assert unknown not in prepare.summary("d", meta).splitlines()[1]


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_text_ids_are_the_tokens_without_end_of_text(cwd, gpt2, kind):
    tok = gpt2 if kind == "gpt2" else tokenizer.BytesTokenizer()
    texts = ["one\ntwo three\n", "", "two lines,\nnone at the end é 😀", "<|endoftext|>\n\n"]
    write([("train", text) for text in texts] + [("val", "other")], tok=tok)
    expected = [i for text in texts for i in tok.encode(text).tolist()]
    assert data.Dataset("d").text_ids("train").tolist() == expected


def test_counts_of_other_documents_are_refused(cwd):
    meta = write([("train", "one"), ("val", "two"), ("val", "three")])
    meta["splits"]["val"]["per_document"]["words"].append(1)
    Path("data/d/meta.json").write_text(json.dumps(meta))
    assert "counts of other documents" in refusal(data.Dataset, "d")


# ---- the batch of a step ----


@pytest.mark.parametrize("n", [*range(1, 200), 1023, 1024, 1025, 4097, 65_537, 100_003])
def test_permute_is_a_permutation(n):
    assert np.array_equal(np.sort(data.permute(np.arange(n), n, data.seed_of(n))), np.arange(n))


def test_permute_is_one_function_of_its_index():
    whole = data.permute(np.arange(1000), 1000, 7)
    assert [int(data.permute([i], 1000, 7)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_keys_give_unrelated_permutations():
    n = 10_000
    found = np.stack([data.permute(np.arange(n), n, data.seed_of(1337, key)) for key in range(12)])
    for a, b in itertools.combinations(np.vstack([found, np.arange(n)]), 2):
        assert (a == b).sum() < 12  # One is expected.
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # six standard deviations
        assert (np.diff(a) == np.diff(b)).sum() < 12  # Nor is one the other, shifted.


def test_all_permutations_are_about_as_frequent():
    keys, n = 2000, 5
    found = np.stack([data.permute(np.arange(n), n, data.seed_of(1337, key)) for key in range(keys)])
    counts = Counter(map(tuple, found.tolist()))
    expected = keys / 120
    assert len(counts) == 120
    # Squared relative deviation: sampling gives 0.06, a Feistel network on so few values, whatever its hash, 0.03 more.
    assert sum((c / expected - 1) ** 2 for c in counts.values()) / 120 < 0.13
    for place, value in itertools.product(range(n), repeat=2):
        assert abs((found[:, place] == value).mean() * n - 1) < 0.3


shapes = st.integers(1, 30).flatmap(lambda block: st.tuples(st.integers(block + 1, 400), st.just(block)))


@quick
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_an_epoch_is_disjoint_blocks_inside_the_tokens(shape, seed):
    n, block_size = shape
    blocks = data.blocks_per_epoch(n, block_size)
    assert blocks * block_size > n - 2 * block_size - 1  # Less than two blocks are left out.
    assert n < 2 * block_size or blocks * block_size <= n - block_size  # An epoch has block_size offsets to begin at.
    for epoch in range(3):
        index = np.arange(epoch * blocks, (epoch + 1) * blocks)
        starts = np.sort(data.sequence_starts(n, block_size, seed, index))
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= n  # the last target too
        assert (np.diff(starts) == block_size).all()


def test_every_epoch_has_its_own_order_and_offset():
    n, block_size = 3000, 30
    blocks = data.blocks_per_epoch(n, block_size)
    starts = data.sequence_starts(n, block_size, 1337, np.arange(40 * blocks)).reshape(40, blocks)
    orders = {tuple(row // block_size) for row in starts}
    assert len(orders) == 40
    assert len(set(starts[:, 0] % block_size)) > 15  # Of 30 offsets 22 are expected in 40 draws.
    of_another_seed = data.sequence_starts(n, block_size, 1338, np.arange(40 * blocks)).reshape(40, blocks)
    assert not set(map(tuple, starts)) & set(map(tuple, of_another_seed))  # in any epoch


@pytest.mark.parametrize("n", [11, 19, 25, 29, 100, 105, 109])
def test_every_token_becomes_a_target_in_some_epoch(n):
    epochs = np.arange(300 * data.blocks_per_epoch(n, 10))
    starts = data.sequence_starts(n, 10, 1337, epochs)
    assert {int(s) + i for s in starts for i in range(1, 11)} == set(range(1, n))


@quick
@given(shape=shapes, first=st.integers(0, 1000), counts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_any_division_into_batches_gives_the_same_sequences(shape, first, counts):
    tokens = np.arange(shape[0], dtype=np.uint16)
    x, y = data.batch(tokens, shape[1], 1337, first, sum(counts))
    begins = [first + sum(counts[:i]) for i in range(len(counts))]
    parts = [data.batch(tokens, shape[1], 1337, b, c) for b, c in zip(begins, counts, strict=True)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), x)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), y)
    # The tokens are their own positions, so a row counts up from its start, and targets are inputs shifted by one.
    starts = data.sequence_starts(len(tokens), shape[1], 1337, np.arange(first, first + sum(counts)))
    assert np.array_equal(x, starts[:, None] + np.arange(shape[1]))
    assert np.array_equal(y, x + 1)
    assert x.dtype == y.dtype == np.int64


def test_the_shortest_train_split_has_one_sequence():
    x, y = data.batch(np.arange(9, dtype=np.uint16), 8, 1337, 5, 2)
    assert x.tolist() == [list(range(8))] * 2
    assert y.tolist() == [list(range(1, 9))] * 2
    assert "block_size=7" in refusal(data.batch, np.arange(8, dtype=np.uint16), 8, 1337, 0, 1)


def test_an_id_that_came_into_the_file_after_it_was_verified_is_named():
    tokens = np.array([1, 2, 300, 4, 5, 6, 7, 8, 9], np.uint16)
    assert "holds the id 300 now, beyond the vocabulary of 300" in refusal(data.batch, tokens, 8, 1337, 0, 1, 300)
    data.batch(tokens, 8, 1337, 0, 1, 301)


def test_a_corpus_of_any_size_needs_no_memory():
    n, block_size = 10**12, 1024
    blocks = data.blocks_per_epoch(n, block_size)
    index = np.concatenate([np.arange(500), np.arange(blocks - 500, blocks + 500), 10**6 * blocks + np.arange(500)])
    tracemalloc.start()
    starts = data.sequence_starts(n, block_size, 1337, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert starts.min() >= 0
    assert starts.max() + block_size + 1 <= n
    assert len(set(starts[:1000] // block_size)) == 1000  # No block of an epoch comes twice.
    assert np.ptp(starts[:500]) > 0.9 * n  # from all over the corpus


def test_seeds_of_neighbouring_micro_batches_differ():
    grid = list(itertools.product((0, 1, 2, 1337), range(40), range(40)))
    seeds = [data.seed_of(*parts) for parts in grid]
    assert len(set(seeds)) == len(grid)
    assert all(0 <= s < 2**63 for s in seeds)
    bits = np.array(seeds, np.uint64)[:, None] >> np.arange(63, dtype=np.uint64) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.05  # eight standard deviations


# ---- evaluation windows ----


@settings(quick, max_examples=300)
@given(n=st.integers(0, 200), block_size=st.integers(1, 20), stride=st.integers(0, 20))
def test_every_id_but_the_first_is_scored_once(n, block_size, stride):
    stride = min(stride, block_size)
    windows = data.stream_windows(n, block_size, stride)
    assert [i for _, end, first in windows for i in range(first, end)] == list(range(1, n))
    longest = block_size if 0 < stride < block_size else block_size + 1  # ids with the last target
    for begin, end, first in windows:
        assert 0 <= begin < first < end <= n  # A target has an input before it, and no window is empty.
        assert end - begin <= longest


@pytest.mark.parametrize("stride", [0, 16])
def test_plain_windows_are_disjoint(stride):
    windows = data.stream_windows(100, 16, stride)
    assert windows == [(i, min(i + 17, 100), i + 1) for i in range(0, 99, 16)]


def windows_of_transformers_guide(seq_len, max_length, stride):
    """The loop of transformers' perplexity guide: the targets that each window scores, with the ids before them."""
    scored, prev_end_loc = [], 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc  # not the stride in the last window
        input_ids = list(range(begin_loc, end_loc))
        target_ids = list(input_ids)
        target_ids[:-trg_len] = [-100] * len(target_ids[:-trg_len])
        # The model shifts the labels. The first one has no input before it.
        scored += [(input_ids[:i], target_ids[i]) for i in range(1, len(target_ids)) if target_ids[i] != -100]
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return scored


@quick
@given(n=st.integers(1, 80), block_size=st.integers(2, 12), stride=st.integers(1, 11))
def test_strided_windows_are_those_of_transformers_guide(n, block_size, stride):
    stride = min(stride, block_size - 1)
    windows = data.stream_windows(n, block_size, stride)
    ours = [(list(range(begin, i)), i) for begin, end, first in windows for i in range(first, end)]
    assert ours == windows_of_transformers_guide(n, block_size, stride)


lengths = st.lists(st.integers(0, 50), max_size=6)
EOT = 256


def documents_of(lengths):
    """Documents of ids that are all different from EOT, and the row of them as a token file has it."""
    documents = [np.arange(n) + 300 for n in lengths]
    return documents, np.array([i for d in documents for i in (EOT, *d)] or [EOT], np.uint16)


@settings(quick, max_examples=300)
@given(lengths=lengths, block_size=st.integers(1, 20))
def test_documents_have_each_id_but_their_end_of_text_scored_once(lengths, block_size):
    documents, ids = documents_of(lengths)
    windows = data.document_windows(ids, EOT, block_size)
    scored = [i for _, end, first in windows for i in range(first, end)]
    assert scored == [i for i, token in enumerate(ids) if token != EOT]
    for begin, end, first in windows:
        assert begin < first < end <= begin + block_size + 1
        assert EOT not in ids[begin + 1 : end]  # No document sees another.
        # The context is as long as it can be: the whole document so far, or block_size inputs.
        assert ids[begin] == EOT or end - 1 - begin == block_size


@quick
@given(n=st.integers(0, 60), block_size=st.integers(1, 12))
def test_a_first_window_begins_with_the_end_of_text_and_full_ones_are_disjoint(n, block_size):
    (document,), ids = documents_of([n])
    windows = data.document_windows(ids, EOT, block_size)
    assert [first for _, _, first in windows] == list(range(1, n + 1, block_size))
    assert [begin for begin, _, _ in windows] == [max(0, min(i, n - block_size)) for i in range(0, n, block_size)]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([50256, 5, 50256, 6, 7], [50256, 5, 50256, 6, 7]), ([5, 50256, 6, 7, 50256], [50256, 5, 50256, 6, 7])],
)
def test_nanogpts_end_of_texts_come_after_documents(cwd, ids, expected):
    Path("data/d").mkdir(parents=True)
    np.array(ids, "<u2").tofile("data/d/val.bin")
    found = data.Dataset("d").document_ids("val")
    assert found.tolist() == expected
    windows = data.document_windows(found, 50256, 8)
    assert [found[begin:end].tolist() for begin, end, _ in windows] == [[50256, 5], [50256, 6, 7]]


@quick
@given(n=st.integers(0, 60), block_size=st.integers(1, 12), stride=st.integers(0, 12))
def test_a_batch_of_windows_pairs_each_input_with_the_id_after_it(n, block_size, stride):
    ids = np.arange(100, 100 + n, dtype=np.uint16)
    windows = [*data.stream_windows(n, block_size, min(stride, block_size)), (0, 1, 1)]  # The last one is empty.
    x, y = data.window_batch(ids, windows, block_size)
    assert x.shape == y.shape == (len(windows), block_size)
    assert x.dtype == y.dtype == np.int64
    for row, (begin, end, first) in enumerate(windows):
        for column in range(block_size):
            target = begin + column + 1
            assert x[row, column] == (ids[begin + column] if target < end else 0)
            assert y[row, column] == (ids[target] if first <= target < end else -1)


def test_a_token_file_that_is_overwritten_in_place_is_found_and_one_that_is_replaced_is_another(cwd):
    write([("train", "some text of a book")])
    dataset = data.Dataset("d")
    dataset.verify("train")
    path, tokens = dataset.paths["train"], dataset.tokens("train")
    dataset.check_unchanged("train")
    whole, before = path.read_bytes(), tokens[:5].tolist()
    os.utime(path, (1, 1))
    dataset.check_unchanged("train")  # A touch changes no byte.
    for content in (b"", whole[:-2], whole[::-1]):
        path.write_bytes(content)
        os.utime(path, (2, len(content)))
        assert "was overwritten while the run read it" in refusal(dataset.check_unchanged, "train")
    path.write_bytes(whole)
    dataset.check_unchanged("train")
    path.with_name("new").write_bytes(b"")
    path.with_name("new").replace(path)
    dataset.check_unchanged("train")
    assert tokens[:5].tolist() == before
    path.unlink()
    dataset.check_unchanged("train")
