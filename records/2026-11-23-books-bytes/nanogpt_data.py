"""Make data/books_nanogpt, what nanoGPT reads: the ids of data/books_bytes, and a meta.pkl of 257 one-letter tokens.

The end-of-texts of the validation split are left out, as train.py does in its evaluations.
"""

import pickle
from pathlib import Path

import numpy as np

to = Path("data/books_nanogpt")
to.mkdir()
for split in ("train", "val"):
    ids = np.fromfile(f"data/books_bytes/{split}.bin", np.uint16)
    (ids[ids != 256] if split == "val" else ids).tofile(to / f"{split}.bin")
letters = [chr(i) for i in range(257)]
meta = {"vocab_size": 257, "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
(to / "meta.pkl").write_bytes(pickle.dumps(meta))
