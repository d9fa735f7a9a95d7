"""Settings of every script: dataclass defaults < Python config files < --key=value. Later wins.

A script declares its settings as one dataclass whose comments are the help:

    @dataclass
    class Settings:
        # data
        dataset: str = "wikitext103"  # a folder under data/
        compile: Literal["auto", True, False] = "auto"  # torch.compile

    s = config.load(Settings)

The type of a setting is the type of its default; a `Literal` lists the values it admits.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import sys
import tokenize
import types
import typing
from pathlib import Path

# A config file describes a run, and all of these read it; each takes the keys that it declares.
SHARED_BY = ("train.py", "eval.py", "sample.py")


class UserError(Exception):
    """A mistake of the user's. Its message is one line that says what is wrong and what to do."""


def run(main, *mistakes):
    """Call main(). A UserError, or one of the exception classes `mistakes`, ends in one line on stderr and status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 must not end a run as it is printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, *mistakes) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:  # a file that can't be read or written: the system says why
        if not error.filename:
            raise
        reason = f"{error.filename}: {error.strerror}; mend that, or name another"
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def load(cls, argv=None, positional="", command_line_only=()):
    """An instance of the dataclass `cls` from its defaults, the config files and the --key=value arguments in `argv`.

    Bare arguments are config files, or go as a tuple to the setting named `positional`. A config file does not set the
    keys in `command_line_only`. Raises UserError; `--help` prints the settings and ends the program with status 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        sys.exit(0)
    hints, values, bare = typing.get_type_hints(cls), {}, []
    hints.pop(positional, None)
    for arg in (a for a in argv if not a.startswith("--")):
        if positional:
            bare.append(arg)
            continue
        for key, (value, where) in read_file(arg, known=set(hints) | shared_keys()).items():
            if key in hints and key not in command_line_only:
                values[key] = convert(key, value, hints[key], where)
    for arg in (a for a in argv if a.startswith("--")):
        key, equals, text = arg[2:].partition("=")  # only the first `=` splits: a value may hold more
        key = key.replace("-", "_")
        if key not in hints:
            raise UserError(f"{arg}: unknown setting {key!r}{nearest(key, hints)}; --help lists them all")
        if not equals:
            raise UserError(f"{arg}: a value is missing, write --{key}=VALUE")
        values[key] = convert(key, text, hints[key], arg, is_text=True)
    return cls(**values, **({positional: tuple(bare)} if positional else {}))


def read_file(path, known):
    """Run a config file. Returns {key: (value, where it stands)} of its public names with plain values."""
    if not os.path.isfile(path):
        if "=" in path:
            raise UserError(f"{path}: settings begin with two dashes, write --{path.lstrip('-')}")
        files = [str(p) for p in Path("config").glob("*.py") if p.name != "__init__.py"]
        close = difflib.get_close_matches(path, files, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else "it is looked for from the current folder"
        raise UserError(f"{path}: no such config file; {hint}")
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(source, path)
        names = {"__file__": path, "__name__": "__config__"}
        exec(compile(tree, path, "exec"), names)
    except (Exception, SystemExit) as error:
        frames = [f.lineno for f in inspect.getinnerframes(error.__traceback__) if f.filename == path]
        own = isinstance(error, SyntaxError) and error.filename == path  # else of text that the file evaluates
        line = (error.lineno or 1) if own else (frames or [1])[-1]
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}; a config file is plain Python") from None
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = {}
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, (types.ModuleType, type)) or callable(value):
            continue
        where = f"{path}:{lines.get(key, 1)}"
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{nearest(key, known)}; begin a name of your own with _")
        found[key] = (value, where)
    return found


def shared_keys():
    """The settings that the scripts of a run declare, read off their source: none of them is imported."""
    root, keys = Path(__file__).parent.parent, set()
    for script in SHARED_BY:
        for node in ast.parse((root / script).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                keys |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return keys


def nearest(key, known):
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f", the nearest is {close[0]!r}" if close else ""


def convert(key, value, hint, where, is_text=False):
    """`value` as the type `hint` asks for. Text from a command line is parsed; a file's value must already fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    kind = origin or hint
    wanted = "True or False" if kind is bool else "a whole number" if kind is int else "a number"
    if origin is typing.Literal:
        for choice in args:
            if (str(choice).lower() == value.lower()) if is_text else (type(choice), choice) == (type(value), value):
                return choice
        wanted = "one of " + ", ".join(map(str, args))
    elif kind is str:
        if isinstance(value, str):
            return value
        wanted = "text in quotes"
    elif kind is tuple:
        items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(convert(key, item, args[0], where, isinstance(value, str)) for item in items)
        wanted = "a list, written a,b"
    elif kind is bool:
        if is_text and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool) and isinstance(value, str if is_text else (int, float)):
        try:
            return number(value, kind)
        except (ValueError, OverflowError):
            pass
    at = where if is_text else f"{where}: {key} = {value!r}"
    raise UserError(f"{at}: {key} takes {wanted}")


def number(value, kind):
    """int: `1e3`, `1_000` and 1000.0 are whole, 0.5 is not; 64 bits. float: finite. Else Value- or OverflowError."""
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):  # of 1e3, which is a whole number all the same
            value = int(value)
    value = float(value) if isinstance(value, str) else value
    result = kind(value)
    if not math.isfinite(result) or result != value or (kind is int and abs(result) >= 2**63):
        raise ValueError(value)
    return result


def check(s, positive="", not_negative="", fraction="", divisible=""):
    """Raise UserError for a setting out of its range. Each argument names settings, separated by spaces.

    positive: > 0.  not_negative: >= 0.  fraction: >= 0 and < 1.  divisible: two settings, the first by the second.
    """
    ranges = [(positive, lambda v: v > 0, "must be more than 0"), (not_negative, lambda v: v >= 0, "can't be negative")]
    for names, fits, says in [*ranges, (fraction, lambda v: 0 <= v < 1, "must be at least 0 and less than 1")]:
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
    """The script's docstring, and each setting with its default and comment, read off the source of `cls`."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    bare = f"{positional.upper()}..." if positional else "[CONFIG_FILE...]"
    out = [(sys.modules[cls.__module__].__doc__ or "").strip(), ""]
    out += [f"usage: python {Path(sys.argv[0]).name} {bare} [--KEY=VALUE...]"]
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    for number, line in enumerate(source.splitlines(), start=1):
        key, comment = line.strip().partition(":")[0], comments.get(number, "")
        if key in defaults and key != positional:
            value = defaults[key]
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            out.append(f"  --{key}={shown}".ljust(38) + f"  {comment}".rstrip())
        elif line.strip().startswith("#"):
            out += ["", comment]
    return "\n".join(out)
