"""Make data/books_nanogpt, what nanoGPT reads: the ids of data/books_bytes, and a meta.pkl of 257 one-letter tokens."""

import pickle
import shutil
from pathlib import Path

to = Path("data/books_nanogpt")
to.mkdir()
for split in ("train.bin", "val.bin"):
    shutil.copy(Path("data/books_bytes", split), to)
letters = [chr(i) for i in range(257)]
meta = {"vocab_size": 257, "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
(to / "meta.pkl").write_bytes(pickle.dumps(meta))
