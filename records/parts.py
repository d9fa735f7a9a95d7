"""Make data sets NAME=N of data/books_bytes: every Nth 2,048 bytes of its train split, and its validation split.

python records/parts.py books_part=158 books_piece=632        which have 2.0 and 0.5 million bytes
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

whole = Path("data/books_bytes")
pieces = np.memmap(whole / "train.bin", dtype="<u2", mode="r")
pieces = pieces[: len(pieces) // 2048 * 2048].reshape(-1, 2048)
for name, every in (argument.split("=") for argument in sys.argv[1:]):
    part = Path("data", name)
    part.mkdir()
    ids = pieces[:: int(every)].tobytes()
    (part / "train.bin").write_bytes(ids)
    shutil.copy(whole / "val.bin", part)
    meta = json.loads((whole / "meta.json").read_text())
    unknown = dict.fromkeys(("documents", "words", "lines", "bytes"))
    meta["splits"]["train"] = {"tokens": len(ids) // 2, **unknown, "sha256": hashlib.sha256(ids).hexdigest()}
    (part / "meta.json").write_text(json.dumps(meta))
