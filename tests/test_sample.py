"""sample.py: what it prints is what the model generates, and nothing else."""

import functools
import subprocess
import sys
from pathlib import Path

import sample
from lib import packed, runtime, tokenizer
from model import GPT

import pytest
import torch
from conftest import ROOT, random_model, refusal, save_huggingface, save_nanogpt_run, save_run, write_meta_pkl
from torch.nn import functional as F

EOT = tokenizer.BytesTokenizer.eot
RULE = "-" * 15 + "\n"


def parrot(ids, **shape):
    """A model that says `ids` after a prompt of one token at any temperature, since only the position decides."""
    model = random_model(**dict(block_size=len(ids), n_layer=1, n_head=1) | shape)
    for p in model.transformer.h.parameters():
        p.data.zero_()
    wte = model.transformer.wte.weight
    wte.data = F.layer_norm(wte.data, wte.shape[1:])
    model.lm_head.weight = wte
    model.transformer.wpe.weight.data = 1000 * wte.data[ids]
    model.transformer.ln_f.weight.data.fill_(100.0)
    model.transformer.ln_f.bias.data.zero_()
    return model


def generated(model, prompt, n, seed=1337, samples=1, spec="bytes", **options):
    """The texts of the ids that generate() gives, each up to its end-of-text."""
    tok = tokenizer.load(spec)
    options = dict(temperature=0.8, top_k=200, eot=tok.eot, vocab_size=tok.vocab_size) | options
    generator = torch.Generator().manual_seed(seed)
    drawn = model.generate(torch.tensor([prompt] * samples), n, generator=generator, **options)
    rows = torch.stack(list(drawn), dim=1).tolist()
    rows = [row[: row.index(tok.eot)] if tok.eot in row else row for row in rows]
    return [tok.decode(row).decode("utf-8", "replace") for row in rows]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(script):
    """run("--key=value", ...) runs the script: (exit status, standard output, standard error)."""
    return functools.partial(script, "sample", "--device=cpu")


@pytest.fixture
def text(run):
    """text("--key=value", ...) is what the script writes to standard output."""

    def text(*args, **kwargs):
        status, out, err = run(*args, **kwargs)
        assert status == 0, err
        return out

    return text


@pytest.fixture
def mistake(run):
    """mistake("--key=value", ...) is the line on which the script ends."""

    def mistake(*args, **kwargs):
        status, out, err = run(*args, **kwargs)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    return mistake


# ---- what is printed ----


@pytest.mark.parametrize("seed", [1337, 1, 2])
def test_one_sample_is_the_prompt_and_the_text_that_the_model_generates(text, seed):
    model = random_model()
    save_run(model)
    expected = "Öl " + generated(model, list("Öl ".encode()), 60, seed)[0] + "\n"
    assert text("--start=Öl ", "--max_new_tokens=60", f"--seed={seed}") == expected


def test_several_samples_are_the_texts_of_one_batch(text):
    model = random_model()
    save_run(model)
    expected = generated(model, [97, 98], 300, samples=3)
    assert len({len(sample.encode()) for sample in expected}) > 1  # Some have ended by themselves.
    assert text("--start=ab", "--num_samples=3", "--max_new_tokens=300") == "".join(
        f"ab{sample}\n{RULE}" for sample in expected
    )


def test_the_options_reach_the_model(text):
    model = random_model()
    save_run(model)
    shown = text("--start=a", "--max_new_tokens=40", "--temperature=1.7", "--top_k=0", "--top_p=0.9", "--seed=5")
    assert shown == "a" + generated(model, [97], 40, 5, temperature=1.7, top_k=0, top_p=0.9)[0] + "\n"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_settings_reach_the_packed_model(run, monkeypatch, dtype):
    save_run(random_model())
    seen = []
    monkeypatch.setattr(packed, "available", lambda rounds=False: True)
    monkeypatch.setattr(packed, "pack", lambda model, *args: seen.append(args))
    assert run(f"--dtype={dtype}", "--num_samples=2", "--top_k=5", "--max_new_tokens=1")[0] == 0
    assert seen == [(2, dtype == "float16", 5, 257)]


def test_a_model_that_is_not_packed_computes_in_the_precision_that_is_named(run, monkeypatch):
    save_run(random_model())
    seen, hidden = [], GPT.hidden

    def spy(self, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return hidden(self, *args)

    monkeypatch.setattr(GPT, "hidden", spy)
    monkeypatch.setattr(packed, "available", lambda rounds=False: False)
    for dtype in ("bfloat16", "float32"):
        assert run(f"--dtype={dtype}", "--max_new_tokens=1")[0] == 0
    assert seen == [True, False]


def test_dropout_is_for_training(text):
    texts = set()
    for dropout in (0.0, 0.9):
        save_run(random_model(dropout=dropout))
        texts.add(text("--temperature=0", "--max_new_tokens=20"))
    assert len(texts) == 1


@pytest.mark.parametrize(("packs", "size"), [(True, 4), (False, 2)])
def test_samples_whose_keys_and_values_do_not_fit_are_refused(run, monkeypatch, packs, size):
    """There are 16 positions in two layers, with 16 numbers each. A packed model keeps them in float32."""
    save_run(random_model())
    monkeypatch.setattr(packed, "available", lambda rounds=False: packs)
    monkeypatch.setattr(packed, "pack", lambda *args: None)
    needed = 3 * size * 2 * 2 * 16 * 16
    for memory, status in ((needed, 0), (needed - 1, 2)):
        monkeypatch.setattr(runtime.Runtime, "memory", lambda self, memory=memory: memory)
        assert run("--num_samples=3", "--dtype=bfloat16", "--max_new_tokens=1")[0] == status


def test_the_same_seed_gives_the_same_text_and_another_seed_another(text):
    save_run(random_model())
    first, again, other = (text(f"--seed={seed}", "--start=a", "--max_new_tokens=50") for seed in (3, 3, 4))
    assert first == again != other


def test_temperature_0_draws_nothing(text):
    save_run(random_model())
    greedy = [text("--temperature=0", f"--seed={seed}", "--start=a", "--max_new_tokens=30") for seed in (3, 4)]
    assert greedy[0] == greedy[1] == "a" + generated(random_model(), [97], 30, temperature=0)[0] + "\n"


@pytest.mark.parametrize("samples", [1, 2])
def test_characters_split_over_tokens_come_out_whole(text, samples):
    """Each of their bytes is a token of its own."""
    words = "naïve – 日本語 😀"
    save_run(parrot(list(words.encode())))
    shown = text("--start=x", f"--max_new_tokens={len(words.encode())}", f"--num_samples={samples}")
    assert shown == f"x{words}\n" + (f"{RULE}x{words}\n{RULE}" if samples == 2 else "")


def test_a_character_cut_off_at_the_end_is_shown_as_such(text):
    save_run(parrot(list("a😀".encode())))
    assert text("--start=x", "--max_new_tokens=3") == "xa\ufffd\n"


@pytest.mark.parametrize("spec", ["bytes", "gpt2"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_sample_stops_at_end_of_text_and_neither_prints_nor_counts_it(run, samples, spec):
    tok = tokenizer.load(spec)
    says = [*tok.encode("hi there").tolist(), tok.eot, *tok.encode(" never").tolist()]
    save_run(parrot(says, vocab_size=tok.vocab_size), tokenizer=spec)
    _, shown, err = run(f"--max_new_tokens={len(says)}", f"--num_samples={samples}")
    assert f"\n{samples * says.index(tok.eot)} tokens, " in err
    assert shown == ("hi there\n" if samples == 1 else f"hi there\n{RULE}" * 2)


def test_a_model_that_always_ends_writes_nothing(text):
    save_run(parrot([EOT] * 8))
    assert text("--start=") == "\n"
    assert text("--start=a") == "a\n"


def test_what_the_program_says_of_itself_goes_to_standard_error(run):
    save_run(parrot(list(b"text")))
    _, out, err = run("--max_new_tokens=4")
    assert out == "text\n"
    assert "out/a/ckpt.pt: step 7; device cpu" in err
    assert "4 tokens, " in err


def test_a_reader_that_leaves_is_no_mistake(folder):
    """This is `sample.py | head -c 1`."""
    save_run(random_model())
    command = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", "--max_new_tokens=10_000", "--start=a"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141
    assert len(err.splitlines()) == 1 and "step 7" in err


# ---- the prompt ----


def test_a_prompt_is_text_a_file_or_standard_input(text):
    save_run(random_model())
    prompt = "Größe=1\r\n\tzwei\n"
    Path("a prompt.txt").write_bytes(prompt.encode())
    few = "--max_new_tokens=20"
    shown = text(f"--start={prompt}", few)
    assert shown.startswith(prompt)
    assert text("--start=FILE:a prompt.txt", few) == shown
    assert text("--start=-", few, stdin=prompt.encode()) == shown
    Path("a prompt.txt").write_bytes(prompt.encode("utf-8-sig"))
    assert text("--start=FILE:a prompt.txt", few) == shown


@pytest.mark.parametrize("start", ["a.txt", "file:a.txt"])
def test_a_file_that_may_have_been_meant_is_said(run, start):
    save_run(random_model())
    assert "prompt itself" not in run(f"--start={start}", "--max_new_tokens=1")[2]
    Path("a.txt").write_text("text")
    status, out, err = run(f"--start={start}", "--max_new_tokens=1")
    assert status == 0 and out.startswith(start) and "--start=FILE:a.txt reads the file" in err


def test_each_line_that_is_typed_is_a_prompt(run):
    """The generator goes on, so that a prompt typed again gets other text. A line that is no prompt ends nothing."""
    save_run(random_model(block_size=32))
    tok, generator = tokenizer.load("bytes"), torch.Generator().manual_seed(1337)
    wanted = ""
    for prompt in ("ab", "cde", "ab"):
        drawn = random_model(block_size=32).generate(
            torch.tensor([list(prompt.encode())]),
            5,
            0.8,
            200,
            eot=tok.eot,
            vocab_size=tok.vocab_size,
            generator=generator,
        )
        wanted += (
            prompt + tok.decode([i for ids in drawn if (i := ids.item()) != tok.eot]).decode("utf-8", "replace") + "\n"
        )
    status, out, err = run("--interactive=True", "--max_new_tokens=5", stdin=b"ab\r\n\xff\ncde\nab")
    assert (status, out) == (0, wanted)
    assert err.count("> ") == 5 and "not UTF-8 at byte 0" in err


def test_a_typed_character_that_a_tokenizer_lacks_ends_nothing(run):
    save_run(random_model(vocab_size=2), tokenizer="char:ab")
    status, out, err = run("--interactive=True", "--max_new_tokens=1", stdin="ä\nab\n".encode())
    assert status == 0 and out.startswith("ab") and "ä" in err


def test_a_prompt_beside_interactive_is_a_mistake(mistake):
    assert "start and interactive exclude each other" in mistake("--interactive=True", "--start=a")


def test_an_empty_prompt_is_the_beginning_of_a_document(text):
    model = random_model()
    save_run(model)
    expected = generated(model, [EOT], 40)[0] + "\n"
    assert text("--max_new_tokens=40") == text("--max_new_tokens=40", "--start=-") == expected


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("", [EOT]),
        ("ab", [97, 98]),
        ("<|endoftext|>", [EOT]),
        ("<|endoftext|>a", [EOT, 97]),
        ("a<|endoftext|><|endoftext|>b", [97, EOT, EOT, 98]),
        ("a<|endoftext|>", [97, EOT]),
        ("<|endof", list(b"<|endof")),
    ],
)
def test_end_of_text_in_a_prompt_is_its_id(text, prompt, ids):
    assert sample.encode_prompt(prompt, tokenizer.BytesTokenizer()) == ids
    model = random_model(1)
    save_run(model)
    assert text(f"--start={prompt}", "--max_new_tokens=20") == prompt + generated(model, ids, 20)[0] + "\n"


def test_end_of_text_in_a_prompt_is_gpt2s_id():
    ids = sample.encode_prompt("Hello<|endoftext|>Hello", tokenizer.load("gpt2"))
    assert ids == [15496, 50256, 15496]


def test_of_a_long_prompt_the_end_is_read_and_all_is_printed(run):
    model = random_model()
    save_run(model)
    prompt = "a prompt of more than sixteen tokens"
    assert run(f"--start={prompt * 200}", "--max_new_tokens=1")[0] == 0  # No file can have such a name.
    status, out, err = run(f"--start={prompt}", "--max_new_tokens=40")
    assert status == 0
    assert out == prompt + generated(model, list(prompt[-16:].encode()), 40)[0] + "\n"
    assert "of the prompt's 36 tokens the last 16 are read" in err
    assert "are read" not in run(f"--start={prompt[:16]}", "--max_new_tokens=1")[2]


@pytest.mark.parametrize("start", ["-", "FILE:prompt.txt", "caf\udce9"])
def test_a_prompt_that_is_not_utf8_is_a_mistake(mistake, start):
    """Python keeps an argument's bytes that are not UTF-8 as surrogates."""
    save_run(random_model())
    Path("prompt.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in mistake(f"--start={start}", stdin=b"caf\xe9")


def test_a_config_file_s_prompt_that_is_no_text_is_a_mistake(mistake):
    Path("c.py").write_text(r'start = "ééé\ud83d"')
    assert "not UTF-8 at character 3" in mistake("c.py")


@pytest.mark.parametrize(("path", "says"), [("nothing.txt", "No such file"), ("out", "Is a directory")])
def test_a_prompt_file_that_cannot_be_read_is_a_mistake(mistake, path, says):
    save_run(random_model())
    assert f"--start=FILE:{path}: {says}" in mistake(f"--start=FILE:{path}")


# ---- models of others ----


def test_a_nanogpt_checkpoint_of_gpt2_samples_only_real_ids(text):
    """Its vocabulary is padded to 50,304 rows. This model finds the padding likeliest."""
    tok = tokenizer.load("gpt2")
    ids = tok.encode(" a man who knew").tolist()
    model = parrot([ids[0], 50_257, 50_303, *ids[1:]], vocab_size=50_304)
    save_nanogpt_run(model, "openwebtext")
    padded = torch.stack(list(model.generate(torch.tensor([[50_256]]), 6, temperature=0)), dim=1)[0]
    assert (padded >= tok.vocab_size).any()
    shown = text("--max_new_tokens=6", "--num_samples=2")
    expected = generated(model, [tok.eot], 6, samples=2, spec="gpt2")
    assert shown == "".join(f"{sample}\n{RULE}" for sample in expected)
    assert shown.startswith(" a")


def test_a_nanogpt_checkpoint_of_characters_reads_them_from_its_dataset(text, mistake):
    chars = "\n aehlo"
    write_meta_pkl("data/letters", chars)
    save_nanogpt_run(parrot([chars.index(c) for c in "hello all"], vocab_size=len(chars)), "letters")
    assert text("--max_new_tokens=9", "--start=a") == "ahello all\n"
    assert text("--max_new_tokens=9") == "hello all\n"  # nanoGPT's own empty prompt is a line end.
    assert "the text has 'x', not one of the model's 7 characters" in mistake("--start=ax")


def test_a_nanogpt_checkpoint_whose_vocabulary_is_not_here_is_a_mistake(mistake):
    """Its dataset's meta.pkl is missing, so it would pass for GPT-2's."""
    save_nanogpt_run(random_model(vocab_size=65), "letters")
    assert "letters" in mistake()


def test_our_checkpoint_of_characters_needs_no_dataset(text, mistake):
    chars = "abc"
    save_run(parrot([2, 0, 1], vocab_size=3), tokenizer="char:" + chars)
    assert text("--start=a", "--max_new_tokens=3") == "acab\n"
    assert text("--max_new_tokens=3") == "cab\n"  # There is no line end, so the first character is the prompt.
    assert "'z'" in mistake("--start=z")


def test_a_huggingface_folder_samples_as_its_checkpoint_does(text):
    model = random_model()
    save_run(model)
    save_huggingface(model, "hf")
    few = "--start=a", "--max_new_tokens=50"
    assert text("--init_from=hf", *few) == text(*few)


def test_a_huggingface_folder_of_another_vocabulary_is_a_mistake(mistake):
    save_huggingface(random_model(vocab_size=99), "hf")
    assert "tokenizer" in mistake("--init_from=hf")


def test_the_config_file_of_a_training_names_its_run(text):
    save_run(random_model())
    Path("out/a").rename("out/b")
    save_run(random_model(1))
    Path("run.py").write_text("out_dir = 'out/b'\ninit_from = 'gpt2-xl'\nblock_size = 4\nmax_iters = 9\n")
    of_b, of_a = (text(f"--out_dir=out/{name}", "--start=a", "--max_new_tokens=50") for name in "ba")
    assert text("run.py", "--start=a", "--max_new_tokens=50") == of_b != of_a


# ---- mistakes ----


@pytest.mark.parametrize(
    "arg",
    [
        "--top_p=0",
        "--top_p=1.01",
        "--top_p=-0.5",
        "--temperature=-0.1",
        "--top_k=-1",
        "--num_samples=0",
        "--max_new_tokens=0",
        "--seed=-1",
    ],
)
def test_a_setting_out_of_range_is_named(mistake, arg):
    save_run(random_model())
    assert f" {arg[2:].split('=')[0]}" in mistake(arg)


def test_no_model_a_broken_one_and_no_device_are_mistakes(mistake):
    assert "there is no run under out" in mistake()
    save_run(random_model())
    assert "no checkpoint" in mistake("--init_from=out/b.pt")
    assert "device=tpu" in mistake("--device=tpu")
    Path("out/a/ckpt.pt").write_bytes(Path("out/a/ckpt.pt").read_bytes()[:-9])
    assert "damaged" in mistake()


@pytest.mark.parametrize(
    ("args", "write"),
    [
        (["Once upon"], "--start='Once upon'"),
        (["k=v text"], "--start='k=v text'"),
        (["- x = 3"], "--start='- x = 3'"),
        (["long " * 999 + "end"], f"--start='{'long ' * 999}end'"),
        (["it's"], "--start='it'\"'\"'s'"),
        (["--start", "Once upon"], "--start='Once upon'"),
        (["\N{EM DASH}start", "Once upon"], "--start='Once upon'"),
        (["start=Once upon"], "--start='Once upon'"),
        (["seed = 3"], "--seed=3"),
    ],
)
def test_a_prompt_without_its_setting_is_told_how_to_write_it(mistake, args, write):
    assert mistake(*args).endswith(f"write {write}\n")


def test_a_checkpoint_without_its_setting_is_told_how_to_write_it(mistake):
    for name in ("out/a/ckpt_iter_10.pt", "a.pt,b.pt"):
        assert mistake(name).endswith(f"{name}: a checkpoint is not a config file, write --init_from={name}\n")


def test_prompts_are_read_as_they_stand():
    """Only a prompt that begins with FILE: or is - names something to read."""
    for prompt in ("", "--", "- a", "a FILE:b", "file:x"):
        assert sample.read_prompt(prompt) == prompt
    assert "--start=FILE:" in refusal(sample.read_prompt, "FILE:")


@pytest.mark.skipif(not packed.available(rounds=True), reason="this torch has no oneDNN or no FBGEMM")
def test_float16_on_a_cpu_is_for_sampling(run, script):
    save_run(random_model())
    written = {}
    for dtype in ("float16", "bfloat16"):  # On a CPU both mean weights in float16.
        status, written[dtype], err = run("--out_dir=out/a", f"--dtype={dtype}", "--max_new_tokens=9")
        assert status == 0 and f"dtype {dtype}" in err, err
    assert written["float16"] == written["bfloat16"] != ""
    status, _, err = script("eval", "--out_dir=out/a", "--dtype=float16", "--device=cpu")
    assert status == 2 and "dtype=float16 needs a CUDA GPU" in err


def test_a_torch_without_fbgemm_refuses_float16_on_a_cpu(run, monkeypatch):
    save_run(random_model())
    monkeypatch.setattr(packed, "available", lambda rounds=False: not rounds)
    status, _, err = run("--out_dir=out/a", "--dtype=float16", "--max_new_tokens=9")
    assert status == 2 and "dtype=float16 needs a CUDA GPU, not cpu; use float32 or auto" in err
    for dtype in ("float32", "bfloat16"):
        status, text, err = run("--out_dir=out/a", f"--dtype={dtype}", "--max_new_tokens=9")
        assert status == 0 and text and f"dtype {dtype}" in err, err
