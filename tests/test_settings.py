"""Settings: defaults < files < command line, typed, and every mistake one line."""

import ast
import contextlib
import io
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import eval
import export
import prepare_text
import sample
import train
from lib import settings
from lib.settings import UserError

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(settings.__file__).parent.parent
CONFIG_FILES = sorted((ROOT / "config").glob("*.py"))


@dataclass
class Example:
    """Every kind of setting there is. The # here is no comment."""

    # the first group
    out_dir: str = "out"  # text
    batch_size: int = 12  # a whole number
    learning_rate: float = 6e-4  # a number
    decay_lr: bool = True  # a switch
    # the second group
    wandb_tags: tuple[str, ...] = ()  # a list of texts
    sizes: tuple[int, ...] = (1, 2)  # a list of numbers, not a shared key
    compile: Literal["auto", True, False] = "auto"  # one of several: # and all


EXPECTED_TYPE = {"out_dir": str, "batch_size": int, "learning_rate": float, "decay_lr": bool}


@pytest.fixture
def write(tmp_path):
    """write(text) -> the path of a config file with that text."""

    def write(text, name="run.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def outcome(argv, cls=Example, **kwargs):
    """What run() makes of the arguments: (settings, "") or (None, what it wrote to stderr)."""
    out, err, status = [], io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            settings.run(lambda: out.append(settings.load(cls, argv, **kwargs)))
        except SystemExit as end:
            status = end.code
    assert status == (0 if out else 2)
    return (out[0] if out else None), err.getvalue()


def mistake(argv, **kwargs):
    """The one line with which run() ends for these arguments."""
    s, err = outcome(argv, **kwargs)
    assert s is None
    assert len(err.splitlines()) == 1
    return err.partition(": ")[2].rstrip("\n")


def fits(value, key):
    """Is `value` one that the setting `key` of Example may hold?"""
    if key == "compile":
        return any(value is choice for choice in (True, False)) or value == "auto"
    if key in ("wandb_tags", "sizes"):
        return type(value) is tuple and all(type(v) is (int if key == "sizes" else str) for v in value)
    return type(value) is EXPECTED_TYPE[key] and (type(value) is not float or math.isfinite(value))


# ----------------------------------------------------------------------------------------------------------------------
# Precedence


def test_no_arguments_give_the_defaults():
    assert settings.load(Example, []) == Example()


def test_later_wins_and_the_command_line_wins_over_every_file(write):
    first = write("out_dir = 'a'\nbatch_size = 1\nlearning_rate = 1.0\n", "first.py")
    second = write("batch_size = 2\nlearning_rate = 2.0\n", "second.py")
    assert settings.load(Example, [first]) == Example("a", 1, 1.0)
    assert settings.load(Example, [first, second]) == Example("a", 2, 2.0)
    assert settings.load(Example, [second, first]) == Example("a", 1, 1.0)
    # wherever it stands among the arguments
    assert settings.load(Example, ["--learning_rate=3", first, second]) == Example("a", 2, 3.0)
    assert settings.load(Example, [first, "--learning_rate=4", second, "--learning_rate=3"]) == Example("a", 2, 3.0)


def test_arguments_default_to_those_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=5"])
    assert settings.load(Example).batch_size == 5


# ----------------------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("--batch_size=32", 32),
        ("--batch-size=32", 32),
        ("--batch_size=1_000", 1000),
        ("--batch_size=1e3", 1000),
        ("--batch_size=2.0", 2),
        ("--batch_size=-1", -1),
        (f"--batch_size={2**53 + 1}", 2**53 + 1),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 0.001),
        ("--learning_rate=1_0.5", 10.5),
        ("--decay_lr=True", True),
        ("--decay_lr=true", True),
        ("--decay_lr=False", False),
        ("--decay_lr=false", False),
        ("--out_dir=out/x", "out/x"),
        ("--out_dir=", ""),
        ("--out_dir=None", "None"),
        ("--out_dir=007", "007"),
        ("--out_dir=a=b=c", "a=b=c"),  # only the first = splits
        ("--out_dir=--x", "--x"),
        ("--wandb_tags=a,b", ("a", "b")),
        ("--wandb_tags=a", ("a",)),
        ("--wandb_tags=a=1,b-c", ("a=1", "b-c")),
        ("--wandb_tags=", ()),
        ("--sizes=1_0,2e1", (10, 20)),
        ("--compile=auto", "auto"),
        ("--compile=True", True),
        ("--compile=true", True),
        ("--compile=False", False),
    ],
)
def test_text_is_read_as_the_type_of_the_default(arg, value):
    key = arg[2:].partition("=")[0].replace("-", "_")
    read = getattr(settings.load(Example, [arg]), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("arg", "wanted"),
    [
        ("--batch_size=0.5", "a whole number"),
        ("--batch_size=1e-3", "a whole number"),
        ("--batch_size=", "a whole number"),
        ("--batch_size=many", "a whole number"),
        ("--batch_size=True", "a whole number"),
        ("--batch_size=nan", "a whole number"),
        ("--batch_size=inf", "a whole number"),
        ("--batch_size=1e999", "a whole number"),
        ("--batch_size=9223372036854775808", "a whole number"),  # 2^63
        ("--batch_size=" + "9" * 5000, "a whole number"),  # more digits than int() reads
        ("--learning_rate=nan", "a number"),
        ("--learning_rate=inf", "a number"),
        ("--learning_rate=-Infinity", "a number"),
        ("--learning_rate=1e999", "a number"),
        ("--learning_rate=fast", "a number"),
        ("--learning_rate=", "a number"),
        ("--decay_lr=1", "True or False"),
        ("--decay_lr=yes", "True or False"),
        ("--decay_lr=", "True or False"),
        ("--sizes=1,2.5", "a whole number"),
        ("--compile=maybe", "one of auto, True, False"),
        ("--compile=1", "one of auto, True, False"),
        ("--compile=", "one of auto, True, False"),
    ],
)
def test_text_of_another_type_is_refused_and_the_argument_named(arg, wanted):
    assert mistake([arg]) == f"{arg}: {arg[2:].partition('=')[0]} takes {wanted}"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate = 1", 1.0),  # an int serves a float
        ("batch_size = 1e3", 1000),
        ("batch_size = 2 ** 10", 1024),
        (f"batch_size = {2**53 + 1}", 2**53 + 1),  # which no float holds
        ("wandb_tags = ['a', 'b']", ("a", "b")),
        ("wandb_tags = 'a', 'b'", ("a", "b")),
        ("wandb_tags = 'a,b'", ("a", "b")),
        ("compile = True", True),
        ("compile = 'auto'", "auto"),
        ("decay_lr = False", False),
    ],
)
def test_values_in_a_file_serve_their_type(write, line, value):
    key = line.split()[0]
    read = getattr(settings.load(Example, [write(line)]), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("batch_size = 0.5", "a whole number"),
        ("batch_size = '32'", "a whole number"),
        ("batch_size = True", "a whole number"),
        ("batch_size = None", "a whole number"),
        ("batch_size = float('nan')", "a whole number"),
        ("batch_size = float('inf')", "a whole number"),
        ("learning_rate = '1e-3'", "a number"),
        ("learning_rate = float('nan')", "a number"),
        ("learning_rate = -float('inf')", "a number"),
        ("learning_rate = 10 ** 400", "a number"),
        ("learning_rate = False", "a number"),
        ("decay_lr = 1", "True or False"),
        ("decay_lr = 'True'", "True or False"),
        ("out_dir = 3", "text in quotes"),
        ("out_dir = None", "text in quotes"),
        (r"out_dir = 'a\0b'", "text, and this has a NUL or is not UTF-8 at character 1"),
        (r"out_dir = '\ud800'", "text, and this has a NUL or is not UTF-8 at character 0"),
        (r"wandb_tags = 'a', 'b\0'", "text, and this has a NUL or is not UTF-8 at character 1"),
        ("wandb_tags = 3", "a list, written a,b"),
        ("wandb_tags = ['a', 3]", "text in quotes"),
        ("compile = 1", "one of auto, True, False"),
        ("compile = 'True'", "one of auto, True, False"),
        ("compile = None", "one of auto, True, False"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused_and_its_line_named(write, line, wanted):
    path = write(f"# why\n\n{line}\n")
    key, said = line.split()[0], mistake([path])
    assert said.startswith(f"{path}:3: {key} = ")
    assert said.endswith(f": {key} takes {wanted}")


def test_text_that_the_system_takes_in_a_name_is_taken(write):
    """Even a byte that is not UTF-8, which Python keeps as a surrogate."""
    name = "a\n\t\x1b é 漢 \udcff\udc80"
    assert settings.load(Example, [f"--out_dir={name}"]).out_dir == name
    assert settings.load(Example, [write(f"out_dir = {ascii(name)}")]).out_dir == name
    assert "has a NUL" in mistake(["--out_dir=a\0"])


KEYS = st.sampled_from([f.name for f in fields(Example)])
NUMBERS = st.one_of(st.integers(), st.floats()).map(str) | st.from_regex(r"-?[0-9_.]{1,4}(e[+-]?[0-9]{1,3})?")
WORDS = st.sampled_from(["True", "false", "auto", "nan", "-inf", "1e3", "1_000", "0.5", "None", "a,b", "1,2", " ", "="])
TEXTS = st.text() | NUMBERS | WORDS | st.lists(NUMBERS, max_size=3).map(",".join)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@given(KEYS, TEXTS)
def test_any_text_gives_a_value_of_the_right_type_or_one_line(key, text):
    s, err = outcome([f"--{key}={text}"])
    if s is None:
        assert len(err.splitlines()) == 1
        assert f": {key} takes " in err
    else:
        assert err == ""
        assert fits(getattr(s, key), key)
        assert asdict(s) == asdict(Example()) | {key: getattr(s, key)}  # and nothing else has changed


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(), PLAIN, max_size=2)


@hypothesis.settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@given(KEYS, VALUES)
def test_any_value_in_a_file_gives_one_of_the_right_type_or_one_line(write, key, value):
    path = write(f"inf, nan = float('inf'), float('nan')\n{key} = {value!r}\ndel inf, nan\n")
    s, err = outcome([path])
    if s is None:
        assert len(err.splitlines()) == 1
        assert f"{path}:2: " in err
    else:
        assert err == ""
        assert fits(getattr(s, key), key)
        assert type(getattr(s, key)) is tuple or getattr(s, key) == value


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_what_is_no_plain_value_in_a_file_is_no_setting(write):
    path = write(
        "import math\nimport os.path as where\nfrom pathlib import Path\nfrom math import sqrt\n"
        "def steps(n):\n    inside = 2\n    return n * inside\n"
        "class Run:\n    size = 3\n"
        "half = lambda n: n // 2\n"
        "_tokens = 2 ** 9\n__version__ = 1\n"
        "batch_size = int(sqrt(_tokens * steps(Run.size - 2) // half(2)))\n"
    )
    assert settings.load(Example, [path]) == Example(batch_size=32)


@pytest.mark.parametrize("line", ["out_dir = len", "def f(): return 'x'\nout_dir = f", "import os\nout_dir = os"])
def test_a_setting_that_is_a_function_is_no_name_to_pass_over(write, line):
    """Such as one whose brackets were forgotten."""
    said = mistake([path := write(line)])
    assert said.startswith(f"{path}:{len(line.splitlines())}: out_dir is a ")


@pytest.mark.parametrize(
    "text",
    [
        "from os import path as out_dir",
        "def out_dir(): return 1",
        "import os as out_dir",
        "exec('def out_dir(): return 1')",
    ],
)
def test_a_function_that_has_the_name_of_a_setting_is_none(write, text):
    assert settings.load(Example, [write(text + "\n")]) == Example()


def test_another_class_of_text_becomes_plain_text(write):
    """No checkpoint could hold numpy's, or one that a file defines."""
    path = write(
        "import enum\nimport numpy as np\nclass Names(enum.StrEnum):\n    A = 'out/a'\n"
        "class Older(str, enum.Enum):\n    A = 'c'\n"
        "out_dir = Names.A\nwandb_tags = [np.str_('b'), Names.A, Older.A]\n"
    )
    s = settings.load(Example, [path])
    assert (s.out_dir, s.wandb_tags) == ("out/a", ("b", "out/a", "c"))
    assert {type(text) for text in (s.out_dir, *s.wandb_tags)} == {str}


def test_a_path_may_begin_in_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write("out_dir = '~/out'\n")
    assert settings.load(Example, [path]).out_dir == "/home/me/out"
    assert settings.load(Example, ["--out_dir=~/out"]).out_dir == "/home/me/out"
    assert settings.load(Example, ["--out_dir=~/a,b~/c,~/d"]).out_dir == "/home/me/a,b~/c,/home/me/d"  # as in init_from
    assert settings.load(Example, ["--out_dir=~/out"], bare_means="out_dir").out_dir == "~/out"  # a prompt
    assert settings.load(Example, ["--out_dir=~/a"], positional="wandb_tags").out_dir == "/home/me/a"


def test_a_file_knows_where_it_lies(write):
    write("7\n", "seven.txt")
    path = write("from pathlib import Path\nbatch_size = int(Path(__file__).with_name('seven.txt').read_text())\n")
    assert settings.load(Example, [path]).batch_size == 7


def test_an_unknown_key_in_a_file_names_the_line_and_the_nearest_key(write):
    path = write("out_dir = 'x'\n\nlearning_rte = 1e-3\n")
    said = mistake([path])
    assert said.startswith(f"{path}:3: ")
    assert "'learning_rte', the nearest is 'learning_rate'" in said


@pytest.mark.parametrize(("arg", "near"), [("--batchsize=3", "'batch_size'"), ("--learning-rat=3", "'learning_rate'")])
def test_an_unknown_key_on_the_command_line_names_the_argument_and_the_nearest_key(arg, near):
    said = mistake([arg])
    assert said.startswith(f"{arg}: ")
    assert f"the nearest is {near}" in said


@pytest.mark.parametrize(
    ("script", "arg", "ours"),
    [
        (train, "--lr=3e-4", "learning_rate"),
        (train, "--LR=3e-4", "learning_rate"),
        (train, "--lr", "learning_rate"),
        (train, "--epochs=3", "max_epochs"),
        (train, "--steps=3", "max_iters"),
        (train, "--max-steps=3", "max_iters"),
        (train, "--seq-len=3", "block_size"),
        (train, "--output_dir=x", "out_dir"),
        (train, "--data=x", "dataset"),
        (train, "--hidden_size=3", "n_embd"),
        (train, "--batch=3", "batch_size"),
        (train, "--bs=3", "batch_size"),
        (train, "--train_steps=3", "max_iters"),
        (train, "--max_seq_length=3", "block_size"),
        (train, "--eval_steps=3", "eval_interval"),
        (train, "--bf16=True", "dtype"),
        (train, "--gpu=0", "device"),
        (train, "--gradient_checkpointing=True", "recompute"),
        (eval, "--max_length=3", "block_size"),
        (eval, "--output_path=x", "json"),
        (sample, "--prompt=x", "start"),
        (sample, "--text=x", "start"),
        (sample, "--length=3", "max_new_tokens"),
        (sample, "--n=3", "num_samples"),
        (prepare_text, "--name=x", "dataset"),
        (sample, "--prompt", "start"),
        (sample, "--model=gpt2", "init_from"),
        (sample, "--max_tokens=3", "max_new_tokens"),
        (export, "--output_dir=x", "hf_dir"),
    ],
)
def test_what_other_programs_call_a_setting_names_ours(script, arg, ours):
    said = str(pytest.raises(UserError, settings.load, script.Settings, [arg]).value)
    assert f"unknown setting '{arg[2:].partition('=')[0].replace('-', '_')}', " in said and f" is {ours!r}" in said


def test_other_names_are_of_settings_and_are_none_themselves():
    keys = {f.name for script in (train, eval, sample, export) for f in fields(script.Settings)}
    assert set(settings.OTHER_NAMES) <= keys
    assert not {other for others in settings.OTHER_NAMES.values() for other in others.split()} & keys
    assert "which" not in mistake(["--prompt=3"])  # Example has no `start`.


def test_a_config_file_with_another_program_s_name_of_a_setting_names_ours(write):
    assert "unknown setting 'lr', which is 'learning_rate' here" in mistake([write("lr = 3")])


@pytest.mark.parametrize("arg", ["--", "--=", "--=3", "--qqqqqqqq=1", "--__init__=3", "--qqqqqqqq"])
def test_a_key_that_is_like_no_other_is_refused_without_a_guess(arg):
    said = mistake([arg])
    assert said.startswith(f"{arg}: unknown setting")
    assert "nearest" not in said


def test_a_file_may_hold_any_key_of_train_eval_and_sample_and_the_command_line_only_its_own(write):
    path = write("".join(f"{f.name} = {f.default!r}\n" for f in fields(train.Settings)) + "batch_size = 3\n")
    assert settings.load(Example, [path]).batch_size == 3
    assert "unknown setting 'n_layer'" in mistake(["--n_layer=3"])


def test_the_shared_keys_are_those_that_the_scripts_declare():
    declared = [f.name for script in (train, eval, sample) for f in fields(script.Settings)]
    assert settings.shared_keys() == set(declared)


def test_a_key_of_its_own_is_known_to_a_script_beside_the_shared_ones(write):
    assert "sizes" not in settings.shared_keys()
    assert settings.load(Example, [write("sizes = [3]\n")]).sizes == (3,)


def test_a_file_does_not_set_what_only_the_command_line_may(write):
    path = write("out_dir = 'of the training'\nbatch_size = 3\n")
    s = settings.load(Example, [path], command_line_only=("out_dir",))
    assert s == Example(batch_size=3)
    s = settings.load(Example, [path, "--out_dir=mine"], command_line_only=("out_dir",))
    assert s == Example(out_dir="mine", batch_size=3)


def test_bare_arguments_go_to_the_positional_setting():
    s = settings.load(Example, ["a.txt", "--batch_size=3", "b=c"], positional="wandb_tags")
    assert s == Example(batch_size=3, wandb_tags=("a.txt", "b=c"))
    assert mistake(["a.txt", "batch_size=3"], positional="wandb_tags").endswith("write --batch_size=3")
    home = os.path.expanduser("~/a*.txt")
    assert settings.load(Example, ["~/a*.txt"], positional="wandb_tags").wandb_tags == (home,)
    assert settings.load(Example, [], positional="wandb_tags").wandb_tags == ()


@pytest.mark.parametrize("bare", [[], ["b"]])
def test_a_positional_setting_by_its_name_is_a_value_or_a_mistake_and_no_traceback(bare):
    s, err = outcome(["--wandb_tags=a", *bare], positional="wandb_tags")
    assert len(err.splitlines()) == 1 if s is None else s.wandb_tags[:1] == ("a",)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes with files


def test_a_list_with_a_space_in_it_is_put_together():
    assert mistake(["--sizes=1,", "2"]) == "2: no space follows a comma, write --sizes=1,2"
    assert mistake(["--wandb_tags=a b,", "c"]) == "c: no space follows a comma, write '--wandb_tags=a b,c'"
    assert mistake(["--init_from=a.pt,", "b.pt"], cls=sample.Settings).endswith("write --init_from=a.pt,b.pt")


def test_a_text_may_end_in_a_comma(write):
    s = settings.load(Example, ["--out_dir=Once upon a time,", write("batch_size = 3")])
    assert (s.out_dir, s.batch_size) == ("Once upon a time,", 3)
    s = settings.load(prepare_text.Settings, ["--separator=,", "notes.txt"], positional="path")
    assert (s.separator, s.path) == (",", ("notes.txt",))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("config/wikitext.py", "wikitext103.py"),
        ("wikitext103", "wikitext103.py"),
        ("wikitext103.py", "wikitext103.py"),
        ("config/dmeo.py", "demo.py"),
    ],
)
def test_a_missing_file_is_answered_with_the_nearest_one(wrong, near, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    for name in ("wikitext103.py", "demo.py"):
        (tmp_path / "config" / name).touch()
    monkeypatch.chdir(tmp_path)
    assert mistake([wrong]) == f"{wrong}: no such config file; did you mean config/{near}?"
    assert mistake(["qqqq"]) == "qqqq: no such config file; it is looked for from the current folder"  # nothing is near
    assert mistake(["config"]).startswith("config: no such config file")  # a folder is not a file
    for name, key in (("best.pt", "out_dir"), ("config.json", "init_from")):
        (tmp_path / key).mkdir()
        (tmp_path / key / name).touch()
        assert mistake([key], cls=train.Settings) == f"{key}: this folder is no config file; write --{key}={key}"
    assert mistake(["init_from"]).startswith("init_from: no such config file")  # Example has no such setting.
    assert mistake(["--config=config/demo.py"]).endswith("a config file is named alone, write config/demo.py")


@pytest.mark.parametrize(
    "text", ["batch_size: 3\n", 'x: "a"\n', '{"batch_size": 3}', "[1]", "batch_size == 3", "learning_rate: float"]
)
def test_a_file_that_is_no_config_file_but_runs_as_python_is_refused(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# one\n" + text)
    if "==" in text:
        path.write_text("batch_size = 2\n" + text)
    line = mistake([str(path)])
    assert line == f"{path}:2: this sets nothing; a config file is Python, with key = value"


def test_values_that_a_program_computes_may_be_of_other_classes(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "import numpy as np\nfrom pathlib import Path\n'a text'\nprint('hello')\n"
        "batch_size = np.int64(7)\nlearning_rate = np.float32(0.5)\nout_dir = Path('a') / 'b'\n"
    )
    s = settings.load(Example, [str(path)])
    assert (s.batch_size, s.learning_rate, s.out_dir) == (7, 0.5, os.path.join("a", "b"))
    assert {type(value) for value in (s.batch_size, s.learning_rate, s.out_dir)} == {int, float, str}


def test_a_number_that_python_does_not_print_is_one_line(tmp_path):
    path = tmp_path / "c.py"
    for key in ("batch_size", "learning_rate", "out_dir"):
        path.write_text(f"{key} = 10**5000\n")
        assert mistake([str(path)]).startswith(f"{path}:1: {key} = int: {key} takes")


@pytest.mark.parametrize("dashes", ["", "-", "\N{HYPHEN}", "\N{EN DASH}", "\N{EM DASH}", "\N{EM DASH}-"])
def test_a_setting_without_its_two_hyphens_is_told_apart_from_a_missing_file(dashes):
    assert mistake([f"{dashes}batch_size=32"]).endswith("write --batch_size=32")


@pytest.mark.parametrize("dashes", ["-", "\N{EN DASH}", "\N{EM DASH}", "\N{EM DASH}\N{EM DASH}", "\N{MINUS SIGN}"])
@pytest.mark.parametrize(
    ("argv", "example"),
    [
        (["batch_size", "8"], "--batch_size=8"),
        (["batch-size", "8"], "--batch_size=8"),
        (["batch_sise", "8"], "--batch_size=8"),
        (["lr", "3e-4"], "--learning_rate=3e-4"),
        (["batch_size"], "--batch_size=VALUE"),
        (["decay_lr"], "--decay_lr=True"),
        (["decay_lr", "False"], "--decay_lr=False"),
        (["out_dir=my runs"], "--out_dir='my runs'"),
        (["out_dir", "my runs"], "--out_dir='my runs'"),
    ],
)
@pytest.mark.parametrize("positional", ["", "wandb_tags"])
def test_a_key_with_wrong_dashes_is_a_setting_and_no_file(dashes, argv, example, positional):
    argv = [dashes + argv[0], *argv[1:]]
    assert mistake(argv, positional=positional).endswith(f"settings begin with two dashes, write {example}")


@pytest.mark.parametrize("arg", ["---batch_size=3", "--\N{EM DASH}batch_size=3"])
def test_a_setting_with_too_many_dashes_is_told_how_to_write_it(arg):
    assert mistake([arg]).endswith("write --batch_size=3")


def test_a_file_whose_name_begins_with_a_dash_is_a_file(write, tmp_path, monkeypatch):
    write("batch_size = 3\n", "-run.py")
    monkeypatch.chdir(tmp_path)
    assert settings.load(Example, ["-run.py"]).batch_size == 3
    assert settings.load(Example, ["-x.txt", "-"], positional="wandb_tags").wandb_tags == ("-x.txt", "-")
    assert mistake(["-x.py"]).startswith("-x.py: no such config file")


@pytest.mark.parametrize("arg", ["qqqq=3", "-qqqq=3", "\N{EM DASH}qqqq=3"])
def test_a_setting_that_does_not_exist_is_not_told_to_take_dashes(arg):
    assert mistake([arg]) == f"{arg}: unknown setting 'qqqq'; --help lists them all"


def test_an_editor_s_dash_is_found_among_positional_arguments_too():
    assert mistake(["a.txt", "\N{EM DASH}batch_size=3"], positional="wandb_tags").endswith("write --batch_size=3")


@pytest.mark.parametrize(
    ("argv", "example"),
    [
        (["--batch_size"], "--batch_size=VALUE"),
        (["--batch-size"], "--batch_size=VALUE"),
        (["--batch_size", "32"], "--batch_size=32"),
        (["--learning_rate", "1e-3", "--batch_size=3"], "--learning_rate=1e-3"),
        (["--batch_size", "--decay_lr=True"], "--batch_size=VALUE"),
        (["--decay_lr"], "--decay_lr=True"),
        (["--decay_lr", "False"], "--decay_lr=False"),
        (["--decay_lr", "true"], "--decay_lr=true"),
        (["--decay_lr", "run.py"], "--decay_lr=True"),
        (["--compile", "False"], "--compile=False"),
        (["--batch_size", "run.py"], "--batch_size=VALUE"),  # `--batch_size=run.py` would be refused in its turn.
        (["--batch_size", "=32"], "--batch_size=32"),
        (["--batch_size", "=", "32"], "--batch_size=32"),
        (["--out_dir", "my runs"], "--out_dir='my runs'"),
        (["--out_dir", "a;b"], "--out_dir='a;b'"),
        (["--out_dir", "it's"], "--out_dir='it'\"'\"'s'"),
        (["--out_dir", ""], "--out_dir=VALUE"),
        (["--out_dir", "a\nb"], "--out_dir=VALUE"),  # One line can't show it, nor two blanks.
        (["--out_dir", "a  b"], "--out_dir=VALUE"),
    ],
)
def test_a_key_without_a_value_is_told_how_to_write_it(argv, example):
    assert mistake(argv) == f"{argv[0]}: a value is missing, write {example}"
    assert mistake(argv, positional="wandb_tags") == f"{argv[0]}: a value is missing, write {example}"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("batch_size = 3\n\nlearning_rate = = 1\n", 3, "SyntaxError"),
        ("batch_size = (3\n", 1, "SyntaxError"),
        ("batch_size = 3\n  out_dir = 'x'\n", 2, "IndentationError"),
        ("batch_size = 3\n\0", 1, "null bytes"),
        ("\nbatch_size = 1 / 0\n", 2, "ZeroDivisionError"),
        ("batch_size = n\n", 1, "NameError"),
        ("\ndef f():\n    return [][0]\n\nbatch_size = f()\n", 3, "IndexError"),
        ("\n\nimport no_such_module\n", 3, "ModuleNotFoundError"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("\n\neval('1 +')\n", 3, "SyntaxError"),
        ("\nraise SystemExit(0)\n", 2, "SystemExit"),
        ("\nraise ValueError('two\\nlines')\n", 2, "ValueError: two lines"),
    ],
)
def test_a_file_that_does_not_run_ends_in_one_line_that_names_its_line(write, text, line, what):
    path = write(text)
    said = mistake([path])
    assert said.startswith(f"{path}:{line}: ")
    assert what in said


def test_a_file_that_is_not_utf8_ends_in_one_line(tmp_path):
    (tmp_path / "run.py").write_bytes(b"out_dir = 'caf\xe9'\n")
    assert "run.py:1: UnicodeDecodeError" in mistake([str(tmp_path / "run.py")])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    """Python runs such a file, and editors on Windows write one."""
    (tmp_path / "run.py").write_bytes(b"\xef\xbb\xbfbatch_size = 3\n")
    assert settings.load(Example, [str(tmp_path / "run.py")]).batch_size == 3


# ----------------------------------------------------------------------------------------------------------------------
# Ranges, help, the end of a program


@dataclass
class Ranges:
    n: float = 0.5
    m: float = 0.5


@pytest.mark.parametrize("kind", ["positive", "not_negative", "fraction"])
@pytest.mark.parametrize("value", [-1, -1e-9, 0, 1e-9, 0.5, 1 - 1e-9, 1, 10**400])
def test_check_admits_what_is_in_range(kind, value):
    good = {"positive": value > 0, "not_negative": value >= 0, "fraction": 0 <= value < 1}[kind]
    if good:
        settings.check(Ranges(m=value), **{kind: "n m"})
    else:
        with pytest.raises(UserError, match=f"^m={value}: m "):
            settings.check(Ranges(m=value), **{kind: "n m"})
        settings.check(Ranges(m=value), **{kind: "n"})  # only what is named is looked at


def test_a_folder_has_a_name():
    settings.check(Example(out_dir="out"), folder="out_dir")
    with pytest.raises(UserError, match="^out_dir is empty; name a folder"):
        settings.check(Example(out_dir=""), folder="out_dir")


@pytest.mark.parametrize("cls", [Example, train.Settings, eval.Settings, sample.Settings], ids=lambda c: c.__module__)
def test_help_shows_each_key_with_a_default_that_the_command_line_takes(cls):
    shown = [line.split()[0] for line in settings.help_text(cls).splitlines() if line.startswith("  --")]
    assert [arg[2:].partition("=")[0] for arg in shown] == [f.name for f in fields(cls)]
    assert settings.load(cls, shown) == cls()


def test_help_shows_a_setting_beside_its_comment():
    lines = [line.split(maxsplit=1) for line in settings.help_text(Example).splitlines()]
    assert ["--batch_size=12", "a whole number"] in lines
    assert ["--sizes=1,2", "a list of numbers, not a shared key"] in lines
    assert ["--compile=auto", "one of several: # and all"] in lines


def test_help_has_the_docstring_the_groups_and_no_more():
    text = settings.help_text(Example)
    assert text.startswith(__doc__)
    assert "[CONFIG_FILE...]" in text
    assert text.index("the first group") < text.index("--out_dir") < text.index("the second group")
    assert "here is no comment" not in text


def test_help_of_a_positional_setting_shows_it_in_the_usage_alone():
    text = settings.help_text(Example, positional="wandb_tags")
    assert "WANDB_TAGS..." in text
    assert "--wandb_tags" not in text
    assert "CONFIG_FILE" not in text


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_whatever_else_is_asked(flag, capsys):
    with pytest.raises(SystemExit) as end:
        settings.load(Example, ["nothing.py", flag, "--nothing=3"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == settings.help_text(Example)


SCRIPT = """
'''A script.'''
import os
from dataclasses import dataclass
from lib import settings

@dataclass
class Settings:
    lines: int = 1  # lines to write
    fail: str = ""  # how to end
    says: bool = False  # say instead of printing
    writes: str = ""  # a file to write while printing

ENDS = {
    "user": settings.UserError("two\\nlines"),
    "os": OSError(5, "Input/output error", "a file"),
    "key": KeyboardInterrupt(),
    "bug": IndexError("two\\nlines"),
    "unnamed": OSError(5, "Input/output error"),
}

def main():
    s = settings.load(Settings)
    if s.writes:
        with open(s.writes, "w") as f:
            os.write(1, b"printed by number")
            os.write(2, b"printed by number")
            f.write("mine alone")
    if s.says:
        settings.say("a line of output")
    else:
        print("a line of output\\n" * s.lines)
    if s.fail:
        raise ENDS[s.fail]

settings.run(main)
"""


@pytest.fixture
def script(tmp_path):
    """script("--key=value", ...) starts SCRIPT as a process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env, command = os.environ | {"PYTHONPATH": str(ROOT)}, [sys.executable, str(tmp_path / "script.py")]

    def start(*args, stdout=subprocess.PIPE):
        more = {"PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "")}
        return subprocess.Popen([*command, *args], env=env | more, stdout=stdout, stderr=subprocess.PIPE, text=True)

    start.env, start.command = env, command
    return start


@pytest.mark.parametrize(
    ("args", "status", "line"),
    [
        (["--lines=2"], 0, None),
        (["--help"], 0, None),
        (["--fail=user"], 2, "script.py: two lines"),
        (["--fail=os"], 2, "script.py: a file: Input/output error; mend that, or name another"),
        (["--fail=key"], 130, "script.py: interrupted"),
        (["--lines=a\nb"], 2, "script.py: --lines=a b: lines takes a whole number"),
        (["--lins=3"], 2, "script.py: --lins=3: unknown setting 'lins', the nearest is 'lines'; --help lists them all"),
    ],
)
def test_a_mistake_ends_in_one_line_and_its_status(script, args, status, line):
    with script(*args) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == (f"{line}\n" if line else "")
    assert ("a line of output" in out) == ("--fail" in args[0] or args == ["--lines=2"])


@pytest.mark.parametrize(("error", "lines"), [("KeyboardInterrupt", ["interrupted"]), ("IndexError(3)", None)])
def test_ctrl_c_while_torch_is_imported_is_one_line(error, lines):
    """settings.run() does not run yet then."""
    command = [sys.executable, "-c", f"import lib; raise {error}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if lines:
        assert done.stderr.splitlines() == lines and done.returncode == -signal.SIGINT
    else:
        assert done.stderr.startswith("Traceback") and done.returncode == 1


SCRIPTS = sorted(p for p in ROOT.glob("*.py") if "settings.load(" in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_runs_main_so_that_a_mistake_is_one_line(path):
    *_, last = ast.parse(path.read_text(encoding="utf-8")).body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    settings.run(main)"


@pytest.mark.parametrize("script", ["train", "eval", "sample", "bench", "export"])
def test_a_script_imports_lib_before_torch(script):
    nodes = ast.parse((ROOT / f"{script}.py").read_text()).body
    modules = [getattr(node, "module", None) or node.names[0].name for node in nodes if hasattr(node, "names")]
    first = next(name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names)
    assert first == "lib"


def test_a_bug_keeps_its_traceback(script):
    with script("--fail=bug") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("Traceback")
    assert "IndexError" in err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_left_is_no_mistake(script, lines):
    """As in `script.py | head -1`, whether the output fits its buffer or not."""
    reader, writer = os.pipe()
    os.close(reader)
    with script(f"--lines={lines}", stdout=writer) as process:
        os.close(writer)
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_output_is_no_mistake(script, monkeypatch, unbuffered):
    """What `say` prints, and what is left in a buffer; Python's own status for the latter is 120."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full, script("--says=True", stdout=full) as process:
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    with open("/dev/full", "w") as full, script("--says=True", "--fail=user", stdout=full) as process:
        assert process.communicate(timeout=60)[1] == "script.py: two lines\n"
    assert process.returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("place", ["full disk", "reader that has left"])
def test_help_that_can_t_be_printed_is_no_mistake(script, tmp_path, monkeypatch, unbuffered, place):
    """The help is longer than the buffer of a stream."""
    path = tmp_path / "script.py"
    path.write_text(path.read_text().replace("A script.", "A script.\n" * 2000))
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    if place == "full disk":
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    with script("--help", stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_output_is_no_mistake_and_no_file_gets_what_is_printed(script, tmp_path, closed):
    command = " ".join(script.command)
    done = subprocess.run(f"exec {command} --writes={tmp_path}/mine {closed}", shell=True, env=script.env, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "mine").read_text() == "mine alone"


# ----------------------------------------------------------------------------------------------------------------------
# The files of this repository


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_a_config_of_the_repository_loads_for_every_script(path):
    s = settings.load(train.Settings, [str(path)])
    train.check(s)
    assert s != train.Settings()
    assert s.out_dir == f"out/{path.stem}" or s.eval_only
    settings.load(Example, [str(path)])
