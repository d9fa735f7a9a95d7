"""Prepare the demo's corpus, data/stdlib: the source of Python's own standard library, as bytes. Nothing is downloaded.

This is also the example of how to add a dataset: prepare_NAME.py passes (split, text, is_last) to prepare.write.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lib import data, prepare, settings, tokenizer
from lib.settings import UserError

# These folders hold tests, packages that were installed later, and modules that are tables and not code.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


@dataclass
class Settings:
    val_every: int = 20  # number of modules of which one goes to the validation split; 2 or more


def modules():
    """The paths of the library's modules in alphabetical order, without those in the SKIPPED folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts) and p.stat().st_size)


def main():
    s = settings.load(Settings)
    if s.val_every < 2:
        raise UserError(f"val_every={s.val_every} leaves nothing to train on; take 2 or more")
    with prepare.lock("stdlib"):
        if "stdlib" in data.names():
            settings.say("data/stdlib exists already; remove the folder to prepare it again")
            return
        paths = modules()
        if len(paths) < 2 * s.val_every:
            raise UserError(
                f"this Python has {len(paths)} modules of its standard library as source; use one with all of them"
            )
        pieces = (
            ("val" if i % s.val_every == 0 else "train", text, last)
            for i, path in enumerate(paths)
            for text, last in prepare.read_pieces(path)
        )
        meta = prepare.write(
            "stdlib", tokenizer.BytesTokenizer(), pieces, total_bytes=sum(p.stat().st_size for p in paths)
        )
    settings.say(prepare.summary("stdlib", meta))


if __name__ == "__main__":
    settings.run(main)
