"""Prepare the demo's corpus, data/stdlib: the source of Python's own standard library, as bytes. Nothing is downloaded.

It is also the example of how to add a dataset: a file prepare_NAME.py that yields (split, text, is_last) to data.write.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import config
import data

# Tests, what is installed beside the library, and modules that are tables and not code.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


@dataclass
class Settings:
    val_every: int = 20  # each so many-th module goes to the validation split


def modules():
    """The paths of the library's modules, without those in SKIPPED folders, in alphabetical order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts) and p.stat().st_size)


def main():
    s = config.load(Settings)
    if s.val_every < 2:
        raise config.UserError(f"val_every={s.val_every} leaves nothing to train on; take 2 or more")
    with data.lock("stdlib"):
        if "stdlib" in data.names():
            print("data/stdlib is there already; remove the folder to prepare it again")
            return
        paths = modules()
        if len(paths) < 2 * s.val_every:
            raise config.UserError(
                f"this Python has {len(paths)} modules of its standard library as source; use one installed with it"
            )
        pieces = (
            ("val" if i % s.val_every == 0 else "train", text, last)
            for i, path in enumerate(paths)
            for text, last in data.read_pieces(path)
        )
        meta = data.write("stdlib", data.BytesTokenizer(), pieces, total_bytes=sum(p.stat().st_size for p in paths))
    print(data.summary("stdlib", meta))


if __name__ == "__main__":
    config.run(main, data.DataError, OSError)
