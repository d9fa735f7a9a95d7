"""What the scripts share. Imports run one way, and no file of lib imports a script. `a <- b` says that b imports a:

settings <- files <- tokenizer <- data <- prepare <- text, wikitext; settings <- processes <- runtime <- captured, fit;
model.py <- assemble; tokenizer, assemble <- huggingface <- checkpoint <- resume <- run; settings <- clock;
clock <- ahead (and runtime), describe; data, tokenizer <- sampling; sampling, describe <- run.
"""

import sys


def report(kind, error, traceback):
    """What Python calls for an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# Importing torch takes seconds, in which somebody may press Ctrl-C. settings.run() is not there yet to answer with a
# line instead of a traceback. So this line stands here, and a script imports lib before torch.
sys.excepthook = report
