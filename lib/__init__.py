"""What the scripts share. Imports run one way, and no file of lib imports a script. `a <- b` says that b imports a:

settings <- files <- tokenizer <- data <- prepare <- text, wikitext; settings <- processes <- runtime <- captured, fit;
model.py <- assemble; tokenizer, assemble <- huggingface <- checkpoint <- resume <- run; settings <- clock;
clock <- ahead (and runtime), describe; data, tokenizer <- sampling; sampling, describe <- run. packed stands alone.
"""

import os
import sys
import time


def others_run(stat="/proc/stat"):
    """Whether other programs keep wanting a core. Only Linux says so, in the file `stat`."""
    for _ in range(3):
        try:
            with open(stat, encoding="ascii") as f:
                running = next(int(line.split()[1]) for line in f if line.startswith("procs_running "))
        except (OSError, StopIteration):
            return False
        if running <= 1:  # this process alone
            return False
        time.sleep(0.003)
    return True


# Threads that share a product wait for each other. On quiet cores they had better not sleep meanwhile. Where another
# program has one of the cores, waiting busily keeps the core from the thread that is waited for, and two threads are
# slower than one. OpenMP reads its variable when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ and others_run():
    os.environ["OMP_WAIT_POLICY"] = "passive"


def report(kind, error, traceback):
    """What Python calls for an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# Importing torch takes seconds, in which somebody may press Ctrl-C. settings.run() is not there yet to answer with a
# line instead of a traceback. So this line stands here, and a script imports lib before torch.
sys.excepthook = report
