"""README.md, docs/ and the help texts: what they name is there, and what they say to type can be typed."""

import dataclasses
import importlib
import re
import shlex
import sys
import tomllib

from lib import settings
from lib.settings import UserError

import pytest
from conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "records").rglob("*.md"))
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "class Settings" in p.read_text(encoding="utf-8"))

# What a reader replaces: a shell variable, or a word in capitals.
PLACEHOLDER = re.compile(r"\$|(?<!\w)[A-Z][A-Z_]{2,}(?!\w)")
# Options of torchrun and ruff.
OTHER_OPTIONS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts", "check"}


def read(path):
    return path.read_text(encoding="utf-8")


# ---- what stands in a page ----


def code(text):
    """The lines of a page's code blocks, a continued one as one, and its code spans."""
    block = re.compile(r"^```.*?\n(.*?)^```$", re.M | re.S)
    lines = [line for body in block.findall(text) for line in body.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", block.sub("", text))]


def commands(text):
    """The commands of a page that run Python: the words of each, from the script or from -m on."""
    for line in code(text):
        if not re.search(r"\b(python3?|torchrun) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            if set(word) <= set("&|;()<>"):
                words.append([])
            else:
                words[-1].append(word)
        for command in words:
            starts = [i for i, word in enumerate(command) if re.fullmatch(r"(.*/)?(python3?|torchrun)", word)]
            if starts:
                rest = command[starts[0] + 1 :]
                while rest and rest[0].startswith("--"):
                    rest = rest[1:]
                if rest:
                    yield rest


def positional(name):
    """The setting of a script that its bare arguments are; '' where they are config files."""
    found = re.search(r'settings\.load\(Settings, positional="(\w+)"', read(ROOT / f"{name}.py"))
    return found[1] if found else ""


def fault(command):
    """What is wrong with a command; '' where it can be typed in the repository's root."""
    if command[:2] == ["-m", "pytest"]:
        return pytest_fault(command[2:])
    if command[0] == "-m":
        return "" if command[1] == "venv" else f"unknown module {command[1]}"
    path, name = ROOT / command[0], command[0].removesuffix(".py")
    if not path.is_file() or 'if __name__ == "__main__":' not in read(path):
        return f"there is no script {command[0]}"
    if name not in SCRIPTS:  # A script without settings, such as records/summary.py.
        return ""
    cls = importlib.import_module(name).Settings
    keys, args = {field.name for field in dataclasses.fields(cls)}, []
    for arg in command[1:]:
        key = arg[2:].partition("=")[0] if arg.startswith("--") else ""
        if not PLACEHOLDER.search(arg):
            args += [arg] if arg != "--help" else []
        elif key and key not in keys:
            return f"{arg}: {name}.py has no such setting"
    try:
        settings.load(cls, args, positional=positional(name))
    except UserError as error:
        return str(error)
    return ""


def pytest_fault(args):
    markers = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.partition(":")[0] for marker in markers}
    for before, arg in zip(["", *args], args, strict=False):
        if before == "-m" and arg not in known:
            return f"there is no marker {arg}"
        if before == "-n" and not arg.isdigit():
            return f"{arg} is no number of processes"
        if not {before, arg} & {"-m", "-n"} and not (ROOT / arg).exists():
            return f"there is no {arg}"
    return ""


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- tests ----


def test_the_readme_is_short():
    text = README.read_bytes()
    assert len(text) <= 10_000
    assert text.count(b"\n") <= 160


def test_each_set_up_is_one_line_that_does_all():
    lines = [line for line in read(README).splitlines() if line.startswith("python3 -m venv")]
    demo, tests = ([part.split() for part in line.split(" && ")] for line in lines)
    venv, python = ["python3", "-m", "venv", ".venv"], ".venv/bin/python"
    assert demo[0] == tests[0] == venv
    assert demo[2] == [python, "train.py", "config/demo.py"] and demo[3][:2] == [python, "sample.py"]
    assert tests[2:] == [[python, "-m", "pytest", "-n", "2"]]
    for parts, files in ((demo, ["requirements.txt"]), (tests, ["requirements.txt", "requirements-dev.txt"])):
        assert parts[1] == [".venv/bin/pip", "install", "-q", *(word for file in files for word in ("-r", file))]
        assert all((ROOT / file).is_file() for file in files)
    pattern = re.search(r"grep -m1 -E '(.*)' README.md", read(ROOT / ".ci/run"))[1]
    found = [line for line in read(README).splitlines() if re.search(pattern, line)]
    assert found == [lines[1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_can_be_typed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [(command, why) for command in commands(read(page)) if (why := fault(command))] == []


def test_commands_are_found():
    found = [command[0] for command in commands(read(README))]
    assert len(found) > 20
    assert {"train.py", "eval.py", "sample.py", "export.py", "prepare_text.py", "plot.py", "bench.py"} <= set(found)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("python trian.py config/demo.py", "no script"),
        ("cd out && python model.py", "no script"),
        ("python train.py config/dmo.py", "no such config file"),
        ("python train.py config/demo.py --batchsize=4", "unknown setting"),
        ("python train.py --batchsize=NUMBER", "no such setting"),
        ("python train.py \\\n  --seed=$SEED \\\n  --batch_size=many", "whole number"),
        ("torchrun --nnodes=2 train.py config/NAME.py --compile=maybe", "one of"),
        ("A=1 .venv/bin/python plot.py out/a --max_los=5", "unknown setting"),
        ("python eval.py --out_dir=out/a --stride", "a value is missing"),
        ("python sample.py --start='a; b | c' --top_k=x  # a comment", "whole number"),
        ("python -m pytest -m slwo", "no marker"),
        ("python -m pytest -n tests", "no number of processes"),
        ("python -m pytest tests/test_nothing.py", "there is no"),
        ("python -m http.server", "unknown module"),
    ],
)
def test_a_command_that_can_not_be_typed_is_found(line, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    for page in (f"text\n\n```\n{line} \n```\n", f"text `{line} ` text\n" if "\\" not in line else ""):
        faults = [why for command in commands(page) if (why := fault(command))]
        assert [says in why for why in faults] == ([True] if page else [])


def test_every_setting_that_is_named_is_declared():
    declared = {f.name for name in SCRIPTS for f in dataclasses.fields(importlib.import_module(name).Settings)}
    for page in PAGES:
        named = {key for line in code(read(page)) for key in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", line)}
        assert named <= declared | OTHER_OPTIONS | {"help", "key"}, page


@pytest.mark.parametrize("page", [*PAGES, *RECORDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", read(page))
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        leads_to = page.parent / file if file else page
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(read(leads_to)), target
    if page == README:
        assert {f"docs/{p.name}" for p in (ROOT / "docs").iterdir()} <= {t.partition("#")[0] for t in targets}


def test_every_file_that_is_named_is_there_and_every_file_is_named():
    name = re.compile(r"[a-z0-9_/]+\.(py|txt)")
    named = {page: {span for span in code(read(page)) if name.fullmatch(span)} for page in PAGES}
    for page, files in named.items():
        assert [file for file in files if not (ROOT / file).is_file()] == [], page
    # A prepare_NAME.py may be the reader's own.
    scripts = {p.name for p in ROOT.glob("*.py") if not p.name.startswith("prepare_")}
    modules = {f"lib/{p.name}" for p in ROOT.glob("lib/[a-z]*.py")}
    assert scripts <= named[README]
    assert scripts | modules <= named[ROOT / "docs/development.md"]


def test_every_name_is_in_the_file_that_it_is_said_to_be_in():
    text = read(ROOT / "docs/development.md")
    places = re.findall(r"`(\w+)`(?: and `(\w+)`)? of `([\w/]+\.py)`", text)
    assert len(places) > 5
    for *names, file in places:
        for name in filter(None, names):
            assert re.search(rf"^(def |class |){name}\b", read(ROOT / file), re.M), (name, file)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_has_a_help_text(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    cls = importlib.import_module(name).Settings
    shown = settings.help_text(cls, positional(name)).splitlines()
    lines = [line.strip() for line in shown if line.startswith("  --")]
    listed = {line[2:].partition("=")[0]: line.partition("  ")[2].strip() for line in lines}
    assert listed.keys() == {field.name for field in dataclasses.fields(cls)} - {positional(name)}
    assert [key for key, text in listed.items() if not text] == []
