"""Prepare WikiText-2 (raw) as data/wikitext2, from the Hugging Face hub or from files on the disk.

    python prepare_wikitext2.py
    python prepare_wikitext2.py --source=wikitext-2-raw-v1.zip          a zip or folder of wiki.{train,valid,test}.raw
    python prepare_wikitext2.py --source=wikitext/                      a folder of the hub's parquet files

Its train split has a fiftieth of WikiText-103's words. The validation and test text are WikiText-103's own. The corpus
must be whole: its rows, words and tokens are compared with the published counts. val_lm_eval.bin and test_lm_eval.bin
hold the same pages in the form that lm-evaluation-harness scores in its task `wikitext`.
"""

from dataclasses import dataclass

from lib import settings, wikitext

# Rows are those of the hub. The paper counts 2,088,628 words in the train split, with one end-of-line for each row. No
# count of its GPT-2 tokens is known.
PUBLISHED = {"train": {"lines": 36_718, "words": 2_088_628 - 36_718}, **wikitext.VAL_AND_TEST}


@dataclass
class Settings:
    source: str = ""  # a folder or zip of wiki.*.raw files, or a folder of the hub's parquet files; '' is the hub
    check: bool = True  # comparison with the published counts; False accepts a part of WikiText-2
    threads: int = 0  # threads that encode; 0 is one for each core


def main():
    s = settings.load(Settings)
    wikitext.write("wikitext2", "WikiText-2", "wikitext-2-raw-v1", PUBLISHED, s)


if __name__ == "__main__":
    settings.run(main)
