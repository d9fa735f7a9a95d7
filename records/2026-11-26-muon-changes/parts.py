"""Make data/books_slice and data/books_piece: 21.1 and 1.8 million bytes of data/books_bytes' train split.

They are every 15th and every 175th 2,048 bytes of it; the validation split stays as it is.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

whole = Path("data/books_bytes")
pieces = np.memmap(whole / "train.bin", dtype="<u2", mode="r")
pieces = pieces[: len(pieces) // 2048 * 2048].reshape(-1, 2048)
for name, every in (("books_slice", 15), ("books_piece", 175)):
    part = Path("data", name)
    part.mkdir()
    ids = pieces[::every].tobytes()
    (part / "train.bin").write_bytes(ids)
    shutil.copy(whole / "val.bin", part)
    meta = json.loads((whole / "meta.json").read_text())
    unknown = dict.fromkeys(("documents", "words", "lines", "bytes"))
    meta["splits"]["train"] = {"tokens": len(ids) // 2, **unknown, "sha256": hashlib.sha256(ids).hexdigest()}
    (part / "meta.json").write_text(json.dumps(meta))
