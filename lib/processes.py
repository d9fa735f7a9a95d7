"""The processes of a training: how they meet, sum gradients, stop together and part."""

import gc
import os
import signal
import socket
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

from lib import settings
from lib.settings import UserError

import torch

PREPARE_TIMEOUT = timedelta(days=1)  # how long processes wait for one that prepares its data
GROUP_TIMEOUT = timedelta(minutes=10)  # how long they wait for one in the middle of training
RESOLVE_SECONDS = 60  # a machine that has just started may not have its name yet
# Each machine may have paths of its own, and what device stands for is compared by the precision that it has.
MAY_DIFFER = ("out_dir", "init_from", "resume_from", "dataset", "device", "dtype")


def environment():
    """(RANK, WORLD_SIZE, LOCAL_RANK, TORCHELASTIC_RESTART_COUNT), as torchrun sets them. Raises UserError."""
    values = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("TORCHELASTIC_RESTART_COUNT", 0)):
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UserError(f"{name}={text[:40]} in the environment is no number; unset it, or start by torchrun")
        values.append(int(text))
    rank, world_size, *_ = values
    if rank >= world_size or world_size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"RANK={os.environ.get('RANK', '')} and WORLD_SIZE={os.environ.get('WORLD_SIZE', '')} in the environment "
            "do not describe a group of processes; unset them, or start by torchrun"
        )
    return values


@contextmanager
def lost_process_advice():
    """Where a group of processes has come apart, end with one line and status 1. The one that failed first says why."""
    try:
        yield
    except RuntimeError as error:
        # nccl and the store raise a DistError. gloo raises a RuntimeError that names the source file it fails in.
        apart = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not (apart and torch.distributed.is_initialized()):
            raise
        reason = " ".join(str(error).split())
        settings.say(f"the processes have lost each other ({reason}); the one that ended first says why", sys.stderr)
        os._exit(1)  # An orderly end would wait for the others.


def meet_all(rt, backend):
    """Join the process group that torchrun describes in the environment. A process that dies ends the others.

    Raises UserError where the processes can't meet.
    """
    if rt.world_size == 1:
        return
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    rt.say(f"waiting for {rt.world_size} processes to meet at {address}, as WORLD_SIZE in the environment wants it")
    check_address(os.environ.get("MASTER_ADDR", ""))
    with interruptible():
        try:
            store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=PREPARE_TIMEOUT))
        except (torch.distributed.DistError, ValueError) as error:
            raise UserError(f"the processes can't meet ({error}); start them by torchrun") from None
        group = torch.distributed.PrefixStore(meet(store, rank, world_size), store)
        options = dict(timeout=GROUP_TIMEOUT, world_size=world_size, rank=rank, store=group)
        if rt.device.type == "cuda" and backend == "nccl":
            options["device_id"] = rt.device  # nccl asks for it at a barrier.
        torch.distributed.init_process_group(backend if rt.device.type == "cuda" else "gloo", **options)


@contextmanager
def interruptible():
    """Let Ctrl-C end the program at once, while torch waits and keeps Python from answering."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # as that of a command in the background is
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_address(host):
    """Raise UserError for a host that has no address. torch would ask for it all the time, with a warning each time."""
    end = time.monotonic() + RESOLVE_SECONDS
    while host:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"the processes can't meet: MASTER_ADDR={host} in the environment has no address ({error}); name "
                    "the first machine, or start them by torchrun"
                ) from None
            time.sleep(1)


def check_agreement(rt, s, checksums):
    """Raise UserError where the processes were started with different settings, data or precisions.

    Each would train on in its own way, and the weights would be those of neither.
    """
    facts = {key: value for key, value in vars(s).items() if key not in MAY_DIFFER}
    facts["dtype"] = str(rt.dtype).removeprefix("torch.")
    facts |= {f"{split}.bin's sha256": digest for split, digest in checksums.items()}
    first, *others = rt.gather(facts)
    for other in others:
        wrong = [key for key in first | other if first.get(key) != other.get(key)]
        if pairs := ", ".join(f"{key} ({first.get(key)!s:.40} and {other.get(key)!s:.40})" for key in wrong):
            raise UserError(f"the processes differ in {pairs}; start all by the same command on the same data")


def meet(store, rank, world_size):
    """Wait for all processes, since one on another machine may still prepare its data. Returns the meeting's name.

    torchrun's store outlives a restart. A process that took the addresses of the dead out of it would wait for them. So
    a meeting has a name of its own, and counts for a process only if the first process has seen it there.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        others = [f"{me}/{r}" for r in range(1, world_size)]
        store.set("meeting", me)
        store.wait(others, PREPARE_TIMEOUT)
        store.set(f"{me}/present", " ".join(store.get(other).decode() for other in others))
        return me
    while True:
        store.wait(["meeting"], PREPARE_TIMEOUT)
        meeting = store.get("meeting").decode()
        store.set(f"{meeting}/{rank}", me)
        if store.check([f"{meeting}/present"]) and me in store.get(f"{meeting}/present").decode().split():
            return meeting
        time.sleep(0.1)


def wrap(model, rt, batch_size, block_size):
    """The model itself for one process; for several, the model in a DDP, which averages their gradients."""
    if rt.world_size == 1:
        return model
    ids = [rt.device.index] if rt.device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # After its first step DDP orders the gradients anew, and the sum of three or more depends on their order. So that a
    # resumed run sums as an unbroken one does, that happens here, before any step.
    x = torch.zeros(batch_size, block_size, dtype=torch.long, device=rt.device)
    for _ in range(2):
        with rt.autocast():
            wrapped(x, x)[1].backward()
    model.zero_grad(set_to_none=True)
    wrapped.require_backward_grad_sync = False  # The loop asks for the sum where a step ends.
    return wrapped


def leave():
    """Leave the group of processes. The caller must not hold what wrap() gave any more.

    A DDP that is freed after its group can hang: it holds Python's lock while a thread of gloo waits for the lock.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # The first process may still be saving.
        gc.collect()
        torch.distributed.destroy_process_group()


class StopSignal:
    """SIGTERM, SIGHUP or Ctrl-C asks to stop after the step in hand. `number` is then that of the signal, else 0.

    A second signal stops at once. Within a second of the first it is the same request: a terminal or a scheduler tells
    every process, and so does torchrun.
    """

    def __init__(self, rt):
        self.number, self.at, self.speaks = 0, 0.0, rt.rank == 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)
        # Windows has no SIGHUP. Under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.receive)

    def receive(self, number, frame):
        if not self.number:
            self.number, self.at = number, time.monotonic()
            if self.speaks:
                with suppress(OSError):  # The terminal may be gone. os.write needs no lock that the program may hold.
                    os.write(2, b"stopping after this step, with a checkpoint; once more stops at once\n")
        elif time.monotonic() - self.at > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def status(self):
        """The exit status of a stopped run: 128 and the signal's number. Another process may have received it."""
        return 128 + (self.number or signal.SIGTERM)
