"""The settings of every script: dataclass defaults < Python config files < --key=value. Later wins.

A script declares its settings as one dataclass. The comments of the dataclass are the script's --help:

    @dataclass
    class Settings:
        # data
        dataset: str = "wikitext103"  # a folder under data/
        compile: Literal["auto", True, False] = "auto"  # torch.compile

    s = settings.load(Settings)

The type of a setting is the type of its default. A `Literal` lists the values that a setting may have.
"""

import ast
import contextlib
import dataclasses
import difflib
import glob
import inspect
import io
import math
import numbers
import os
import re
import shlex
import sys
import tokenize
import types
import typing
from pathlib import Path

# An editor may turn the two hyphens of an option into a longer dash.
DASHES = "-\N{HYPHEN}\N{EN DASH}\N{EM DASH}\N{HORIZONTAL BAR}\N{MINUS SIGN}"

standing = ""  # the bar on the terminal, which has no end of line


class UserError(Exception):
    """A mistake of the user's. Its message is one line that says what is wrong and what to do about it."""


def run(main):
    """Call main(). A UserError ends the program with one line on stderr and status 2, and with no traceback.

    A file that the system refuses ends it in the same way. Ctrl-C ends it with status 130, a closed pipe with 141.
    """
    keep_standard_files()
    try:
        main()
        flush(sys.stdout)
    except BrokenPipeError:  # The reader of our output is gone, as in `python sample.py | head`.
        sys.exit(141)
    except UserError as error:
        end(str(error), 2)
    except OSError as error:
        if not error.filename:
            raise
        end(f"{error.filename}: {error.strerror}; mend that, or name another", 2)
    except KeyboardInterrupt:
        end("interrupted", 130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError):
                flush(stream)


def keep_standard_files():
    """See to it that whatever is printed neither ends the program nor lands in a file of ours."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # The next file that is opened would get the number of a closed one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)  # Python has None for a closed one.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A name that is not UTF-8 must not end a run when it is printed.
            stream.reconfigure(errors="backslashreplace")


def flush(stream):
    """Have a stream write what it holds, and forget what a full disk or a closed terminal does not take.

    For that Python would end with a status of its own. Raises BrokenPipeError where the reader of the stream is gone.
    """
    try:
        if stream:
            stream.flush()
    except (OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise


def say(text, file=None, end="\n"):
    """Print a line, without the bar that may stand there. A full disk or a closed terminal does not end the program."""
    show_bar("")
    with contextlib.suppress(OSError):
        print(text, file=file, end=end, flush=True)


def say_once(text):
    """Print a line on stderr. Of the processes that torchrun starts only the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        say(text, file=sys.stderr)


def show_bar(bar):
    """Let a bar stand on the terminal's line, in the place of the one before; '' is none."""
    global standing
    with contextlib.suppress(OSError):
        if standing:
            print("\r" + " " * len(standing) + "\r", file=sys.stderr, end="", flush=True)
        standing = bar
        if bar:
            print(bar, file=sys.stderr, end="", flush=True)


def brief(error):
    """The beginning of what an error says, for a part of a line."""
    return " ".join(str(error).split())[:200]


def end(message, status):
    """End the program with one line on stderr, after the name of the script, and an exit status."""
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def load(cls, argv=None, positional="", command_line_only=(), bare_means=""):
    """An instance of the dataclass `cls` from its defaults, the config files and the --key=value arguments in `argv`.

    Bare arguments are config files. Where `positional` names a setting, they are its values instead. A config file does
    not set the keys in `command_line_only`. `bare_means` is the setting that a bare argument may have been meant for: a
    text, in which a ~ stays. `--help` prints the settings and ends the program with status 0. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        say(help_text(cls, positional))
        sys.exit(0)
    hints = typing.get_type_hints(cls)
    hints.pop(positional, None)
    given, bare = {}, []  # from the command line
    for i, arg in enumerate(argv):
        key, equals, text = arg[2:].partition("=")  # Only the first `=` splits: a value may hold more of them.
        key = key.replace("-", "_")
        if arg.startswith("--") and equals and key in hints:
            given[key] = convert(key, text, hints[key], arg, is_text=True)
            continue
        is_no_path = "=" in arg and not os.path.exists(arg)
        if arg[:1] in DASHES or is_no_path and (not positional or arg.partition("=")[0] in hints):
            refuse_setting(arg, argv[i + 1 :], hints)
        if i and argv[i - 1].endswith(",") and takes_a_list(argv[i - 1], hints):
            raise UserError(f"{arg}: no space follows a comma, write {shlex.quote(argv[i - 1] + arg)}")
        if "init_from" in hints and arg.endswith(".pt"):
            raise UserError(f"{arg}: a checkpoint is not a config file, write {example('init_from', [arg], str)}")
        bare.append(arg)
    if positional:
        return cls(**at_home(given, but=bare_means), **{positional: tuple(map(home_for_tilde, bare))})
    values = {}
    for path in bare:
        if not os.path.isfile(path):
            raise UserError(no_such_file(path, hints, bare_means))
        for key, (value, where) in read_file(path, known=set(hints) | shared_keys()).items():
            if key in hints and key not in command_line_only:
                values[key] = convert(key, value, hints[key], where)
    return cls(**at_home(values | given, but=bare_means))


def takes_a_list(arg, hints):
    """Whether an argument is a setting of several values. A prompt or a separator may end in a comma itself."""
    key = arg[2:].partition("=")[0].replace("-", "_")
    return arg.startswith("--") and (key == "init_from" or typing.get_origin(hints.get(key)) is tuple)


def at_home(values, but):
    """Settings with the home folder for a ~ at their beginning, which no shell puts after `=`. `but` stays as it is."""
    return {k: home_for_tilde(v) if isinstance(v, str) and k != but else v for k, v in values.items()}


def home_for_tilde(text):
    """A path, or several with commas between them, with the home folder for ~."""
    return ",".join(os.path.expanduser(part) if part[:2] == "~/" else part for part in text.split(","))


def refuse_setting(arg, following, hints):
    """Raise UserError for a setting that is not written as --key=value. `following` are the arguments after it.

    Without two dashes, text with white space is a setting only where it begins with an exact key. It may be a prompt.
    """
    word, equals, text = arg.lstrip(DASHES).partition("=")
    key, has_dashes, is_one_word = word.strip().replace("-", "_"), arg.startswith("--"), len(arg.split()) == 1
    meant = key if key in hints or has_dashes or not is_one_word else guess(key, hints, cutoff=0.75)[0]
    if meant in hints:
        wrong = "a value is missing" if has_dashes and not equals else "settings begin with two dashes"
        values = [text.strip()] if equals else following
        raise UserError(f"{arg}: {wrong}, write {example(meant, values, hints[meant])}")
    if text.endswith(".py") and os.path.isfile(text):
        raise UserError(f"{arg}: a config file is named alone, write {shlex.quote(text)}")
    if has_dashes or equals and is_one_word:
        raise UserError(f"{arg}: unknown setting {key!r}{guess(key, hints)[1]}; --help lists them all")


def example(key, following, hint):
    """`--key=value` as a shell takes it. The value is the first argument of `following`, where the setting takes it."""
    following = following[1:] if following[:1] == ["="] else following
    text = following[0].removeprefix("=") if following and not following[0].startswith("--") else ""
    with contextlib.suppress(UserError):
        convert(key, text, hint, "", is_text=True)
        if text.isprintable() and text.split(" ") == text.split():  # What is printed on one line is the same text.
            return f"--{key}={shlex.quote(text)}"
    return f"--{key}=" + ("True" if hint is bool else "VALUE")


def read_file(path, known):
    """Run a config file. Returns {key: (value, where it stands)} of its public names with plain values.

    Raises UserError for a file that fails, and for a name that is not in `known`.
    """
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(source, path)
        names = {"__file__": path, "__name__": "__config__"}
        exec(compile(tree, path, "exec"), names)
    except (Exception, SystemExit) as error:
        frames = [f.lineno for f in inspect.getinnerframes(error.__traceback__) if f.filename == path]
        in_file = isinstance(error, SyntaxError) and error.filename == path  # False for text that the file evaluates
        line = (error.lineno or 1) if in_file else (frames or [1])[-1]
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}; a config file is plain Python") from None
    for node in tree.body:  # YAML's `key: value` and JSON's braces are Python too, and bind no name.
        is_bare = isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Call))
        if is_bare or isinstance(node, ast.AnnAssign) and node.value is None:
            raise UserError(f"{path}:{node.lineno}: this sets nothing; a config file is Python, with key = value")
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    values = {}
    for key, value in names.items():
        where = f"{path}:{lines.get(key, 1)}"
        if key.startswith("_"):
            continue
        if isinstance(value, types.ModuleType) or callable(value):
            # With an = it is a slip. A def, a class or an import may have the name of a setting.
            if key in known and key in lines:
                raise UserError(
                    f"{where}: {key} is a {type(value).__name__}; give it a value, or begin the name of your own with _"
                )
            continue
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{guess(key, known)[1]}; begin a name of your own with _")
        values[key] = (value, where)
    return values


def no_such_file(path, hints, bare_means):
    """What to say of a bare argument that is no config file."""
    for key, name in (("init_from", "config.json"), ("out_dir", "*.pt")):
        if key in hints and glob.glob(os.path.join(glob.escape(path), name)):
            return f"{path}: this folder is no config file; write {example(key, [path], str)}"
    close = difflib.get_close_matches(path, map(str, Path("config").glob("*.py")), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else "it is looked for from the current folder"
    if bare_means and not path.endswith(".py"):
        hint = f"write {example(bare_means, [path], str)}"
    return f"{path}: no such config file; {hint}"


def shared_keys():
    """The settings of the scripts that read a run's config file, from their source, without an import.

    Each of these scripts takes the settings that it declares itself.
    """
    root, keys = Path(__file__).parent.parent, set()
    for script in ("train.py", "eval.py", "sample.py"):
        for node in ast.parse((root / script).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                keys |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return keys


# What other programs call a setting, where that is not close to our name of it. The first one that a script has counts.
OTHER_NAMES = {
    "learning_rate": "lr",
    "min_lr": "min_learning_rate",
    "max_iters": "steps num_steps total_steps train_steps max_steps max_train_steps num_train_steps num_iterations",
    "batch_size": "bs micro_batch_size per_device_train_batch_size per_device_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "block_size": "context context_length seq_len max_seq_len sequence_length n_positions n_ctx max_length "
    "max_seq_length",
    "n_layer": "depth",
    "n_head": "num_attention_heads",
    "n_embd": "width dim d_model hidden_size embedding_dim",
    "n_inner": "d_ff intermediate_size",
    "weight_decay": "wd",
    "grad_clip": "max_grad_norm max_norm clip_grad",
    "eval_interval": "eval_steps eval_every val_loss_every",
    "save_interval": "save_steps save_every",
    "cooldown_frac": "warmdown_iters",
    "patience": "early_stopping early_stopping_patience",
    "recompute": "gradient_checkpointing activation_checkpointing",
    "device": "gpu gpus use_cpu no_cuda",
    "dtype": "precision mixed_precision bf16 fp16",
    "wandb_log": "report_to",
    "start": "prompt text",
    "max_new_tokens": "length max_length max_tokens max_gen_toks",
    "num_samples": "n num num_return_sequences",
    "hf_dir": "out output output_dir save_dir",
    "json": "output_path",
    "out_dir": "output save_dir",
    "init_from": "model model_name model_name_or_path model_args pretrained checkpoint checkpoint_dir checkpoint_path",
    "dataset": "data data_dir name train_file train_bin input_bin",
}


def guess(key, known, cutoff=0.5):
    """(The setting that an unknown key may have meant, what a message says of it); two '' where none is like it."""
    for name, others in OTHER_NAMES.items():
        if name in known and key.lower() in others.split():
            return name, f", which is {name!r} here"
    for name in difflib.get_close_matches(key, sorted(known), n=1, cutoff=cutoff):
        return name, f", the nearest is {name!r}"
    return "", ""


# Messages say by these words what a setting of each type takes.
WANTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    tuple: "a list, written a,b",
}


def convert(key, value, hint, where, is_text=False):
    """`value` as the type `hint` asks for. Text from a command line is parsed. A file's value must fit as it is.

    Raises UserError, which begins with `where` the value stands.
    """
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    wanted = WANTED.get(kind) or "one of " + ", ".join(str(choice) for choice in args if choice != "")
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # numpy's
        value = value.item()
    if kind in (bool, typing.Literal):
        for choice in args or (True, False):
            if (str(choice).lower() == value.lower()) if is_text else (type(choice), choice) == (type(value), value):
                return choice
    elif kind is str:
        value = os.fspath(value) if isinstance(value, Path) else value
        if isinstance(value, str):
            # No name of a file has these. Python keeps an argument's bytes that are not UTF-8 as the other surrogates.
            if not (refused := re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)):
                return str.__str__(value)  # A file may give another class of text, which no checkpoint could hold.
            wanted = f"text, and this has a NUL or is not UTF-8 at character {refused.start()}"
    elif kind is tuple:
        items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(convert(key, item, args[0], where, isinstance(value, str)) for item in items)
    elif not isinstance(value, bool) and isinstance(value, str if is_text else (int, float)):
        with contextlib.suppress(ValueError, OverflowError):
            return number(value, kind)
    at = where if is_text else f"{where}: {key} = {shown(value)}"
    raise UserError(f"{at}: {key} takes {wanted}")


def shown(value):
    """The beginning of a value's text. Python refuses that of a number of some thousand digits."""
    with contextlib.suppress(ValueError):
        return brief(repr(value))
    return type(value).__name__


def number(value, kind):
    """`value` as an int of at most 64 bits, or as a finite float. `1e3`, `1_000` and 1000.0 are whole numbers.

    Raises ValueError or OverflowError.
    """
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):  # int() does not read 1e3; float() below does.
            value = int(value)
    value = float(value) if isinstance(value, str) else value
    result = kind(value)
    if not math.isfinite(result) or result != value or (kind is int and abs(result) >= 2**63):
        raise ValueError(value)
    return result


def check(s, positive="", not_negative="", fraction="", divisible="", folder=""):
    """Raise UserError for a setting out of its range. Each argument names settings, separated by spaces.

    positive: > 0.  not_negative: >= 0.  fraction: >= 0 and < 1.  divisible: two settings, the first by the second.
    folder: not empty.
    """
    for name in folder.split():
        if not getattr(s, name):
            raise UserError(f"{name} is empty; name a folder, or leave it out")
    ranges = (
        (positive, lambda v: v > 0, "must be more than 0"),
        (not_negative, lambda v: v >= 0, "can't be negative"),
        (fraction, lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
    )
    for names, fits, says in ranges:
        for name in names.split():
            if not fits(value := getattr(s, name)):
                raise UserError(f"{name}={value}: {name} {says}")
    if divisible:
        whole, part = divisible.split()
        if getattr(s, whole) % getattr(s, part):
            raise UserError(
                f"{whole}={getattr(s, whole)} is not divisible by {part}={getattr(s, part)}; change one of them"
            )


def help_text(cls, positional=""):
    """The script's docstring, and each setting with its default and its comment from the source of `cls`."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    bare = f"{positional.upper()}..." if positional else "[CONFIG_FILE...]"
    usage = f"usage: python {Path(sys.argv[0]).name} {bare} [--KEY=VALUE...]"
    out = [(sys.modules[cls.__module__].__doc__ or "").strip(), "", usage]
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    for line_number, line in enumerate(source.splitlines(), start=1):
        key, comment = line.strip().partition(":")[0], comments.get(line_number, "")
        if key in defaults and key != positional:
            value = defaults[key]
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            out.append(f"  --{key}={shown}".ljust(38) + f"  {comment}".rstrip())
        elif line.strip().startswith("#"):
            out += ["", comment]
    return "\n".join(out)
