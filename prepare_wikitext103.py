"""Prepare WikiText-103 (raw) as data/wikitext103, from the Hugging Face hub or from files on the disk.

    python prepare_wikitext103.py
    python prepare_wikitext103.py --source=wikitext-103-raw-v1.zip      a zip or folder of wiki.{train,valid,test}.raw
    python prepare_wikitext103.py --source=wikitext/                    a folder of the hub's parquet files

The corpus must be whole: its rows, words and tokens are compared with the published counts. val_lm_eval.bin and
test_lm_eval.bin hold the same pages in the form that lm-evaluation-harness scores in its task `wikitext`.
"""

from dataclasses import dataclass

from lib import settings, wikitext

# Rows and words are those published with the corpus. GPT-2's tokens are the count that others have published.
PUBLISHED = {
    "train": {"lines": 1_801_350, "words": 101_425_671, "tokens": 117_920_140},
    **wikitext.VAL_AND_TEST,
}


@dataclass
class Settings:
    source: str = ""  # a folder or zip of wiki.*.raw files, or a folder of the hub's parquet files; '' is the hub
    check: bool = True  # comparison with the published counts; False accepts a part of WikiText-103
    threads: int = 0  # threads that encode; 0 is one for each core


def main():
    s = settings.load(Settings)
    wikitext.write("wikitext103", "WikiText-103", "wikitext-103-raw-v1", PUBLISHED, s)


if __name__ == "__main__":
    settings.run(main)
