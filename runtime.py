"""Device, precision, compilation and processes: what is left on `auto` is chosen here, and the reason is said."""

import ctypes
import math
import os
import re
import signal
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

PREPARE_TIMEOUT = timedelta(days=1)  # how long processes wait for one that prepares its data
GROUP_TIMEOUT = timedelta(minutes=10)  # and for one in the middle of training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense 16-bit tensor-core peak in FLOP/s, by a part of the device's name, the more specific first (NVIDIA data sheets).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class RuntimeChoiceError(ValueError):
    """A device, precision or number of processes that is not to be had here. The message is one line."""


@dataclass
class Runtime:
    """Where and how to compute."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int  # of this process among all
    world_size: int
    why: str  # the line for the start of the log

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, *arrays):
        """int64 numpy arrays as tensors on the device; the copy to a GPU overlaps with what it computes."""
        tensors = [torch.from_numpy(a).contiguous() for a in arrays]  # a strided copy would not be asynchronous
        if self.device.type != "cuda":
            return [t.to(self.device) for t in tensors]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def peak_flops(self):
        """The device's dense peak at this precision in FLOP/s, 0 where it is not known."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return 0
        name = torch.cuda.get_device_name(self.device)
        return next(
            (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b(?! (Ti|Laptop|D|NVL)\b)", name)), 0
        )

    def memory(self):
        """Bytes of the device's memory; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        sizes = [os.sysconf(name) for name in names if name in getattr(os, "sysconf_names", ())]
        memory = math.prod(sizes) if len(sizes) == 2 and min(sizes) > 0 else 0
        with suppress(OSError, ValueError):  # a container's limit; "max" is none
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return memory

    def same(self, value):
        """Whether all processes hold the same value, a plain one."""
        if self.world_size == 1:
            return True
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return all(v == value for v in values)

    def of_the_first(self, value):
        """The value, a plain one, that the first process holds."""
        values = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def sum(self, tensor):
        """The tensor, summed in place over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def choose(device="auto", dtype="auto", compile="auto", training=False, deterministic=False):
    """The Runtime of this process. Raises RuntimeChoiceError for what this machine does not have.

    `deterministic` takes on a GPU the kernels that give the same bits in every run; on a CPU all of them do.
    """
    reasons = []
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        reasons.append("the best device here")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RuntimeChoiceError(f"device={device} is not a device; use auto, cuda, cuda:1, mps or cpu") from None
    if chosen.type not in ("cuda", "mps", "cpu"):
        raise RuntimeChoiceError(f"device={device} is not supported; use auto, cuda, cuda:1, mps or cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else chosen.index or 0
        if index >= count:
            raise RuntimeChoiceError(
                f"device={device}: torch {torch.__version__} sees {count} CUDA devices here; use device=cpu, fewer "
                "processes, or a torch and a driver that see the GPU"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeChoiceError("device=mps: this machine has no Apple GPU that torch can use; use device=auto")

    if dtype == "auto":
        dtype, why = auto_dtype(chosen)
        reasons.append(why)
    if dtype == "float16" and chosen.type != "cuda":
        raise RuntimeChoiceError(f"dtype=float16 needs a CUDA GPU, not {chosen.type}; use float32 or auto")
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        # TF32 is what people expect of float32 training on a GPU; an evaluation computes what it says.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
            reasons.append("deterministic: slower attention gradients, the same bits in every run")

    if compile == "auto":
        compile, why = auto_compile(chosen)
        reasons.append(why)
    if training or compile:
        try:  # torch's optimizers load it too, and it makes its cache folder as it loads
            from torch import _dynamo  # noqa: F401
        except OSError as error:
            if not error.filename:  # such as a missing library
                raise
            raise RuntimeChoiceError(
                f"torch can't make its cache folder ({error}); make room there, or name another by "
                "TORCHINDUCTOR_CACHE_DIR=PATH in the environment"
            ) from None
    line = f"device {chosen}, dtype {dtype}, compile {compile}"
    line += f", {world_size} processes" if world_size > 1 else ""
    line += f" ({'; '.join(reasons)})" if reasons else ""
    return Runtime(chosen, DTYPES[dtype], compile, rank, world_size, line)


def keep_freed_memory():
    """Have the C library keep the memory that tensors leave: what it hands back is cleared, page by page, before reuse.

    A step on a CPU spends some percent of its time on that otherwise. No effect where the library is not GNU's.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # Older versions take no more than 32 MiB for the first, and answer 0.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def auto_dtype(device):
    if device.type != "cuda":
        return "float32", f"float32 is the fast one on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return "bfloat16", f"capability {major}.{minor} has bfloat16 in hardware"
    return "float16", f"capability {major}.{minor} has no bfloat16 in hardware"


def auto_compile(device):
    if device.type == "cuda":
        try:
            import triton  # noqa: F401  torch.compile generates GPU kernels with it
        except ImportError:
            return False, "no triton to compile with"
        return True, "compile pays on a GPU"
    return False, f"compile does not pay on {device.type}"


def compile_blocks(model, rt, batch_size, block_size):
    """Compile the model's blocks and try one on the shape to come; where that fails, say so and stay eager.

    One block is enough to find out, and the others share its compiled graph: that of training or of evaluation, as the
    model's mode is.
    """
    block, training = model.transformer.h[0], model.training
    h = torch.zeros(batch_size, block_size, model.config.n_embd, device=rt.device)
    if rt.device.type == "cpu":
        # It would try for seconds whether the compiler makes vector code; one that does not is found out below.
        torch._inductor.config.cpp.vec_isa_ok = True
    model.compile_blocks()
    try:
        with rt.autocast(), torch.set_grad_enabled(training):
            y = block(h.requires_grad_(training))
            if training:
                y.sum().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        model.uncompile_blocks()
        torch._dynamo.reset()
        reason = " ".join(str(error).split())[:120]
        print(f"compile failed ({type(error).__name__}: {reason}); going on without it", flush=True)
    finally:
        model.zero_grad(set_to_none=True)


def is_out_of_memory(error):
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        says in text for says in ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    )


@contextmanager
def memory_advice(advice):
    """Running out of memory in here ends in one line, `advice`, as a RuntimeChoiceError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeChoiceError(f"out of memory{advice}") from None


@contextmanager
def lost_process_advice():
    """Where a group of processes has come apart: one line and status 1, since the first failure is told elsewhere."""
    try:
        yield
    except RuntimeError as error:
        # nccl and the store raise a DistError, gloo a RuntimeError with the name of the file that it fails in.
        apart = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not (apart and torch.distributed.is_initialized()):
            raise
        reason = " ".join(str(error).split())
        line = f"the processes have lost each other: one has ended, and says why, or {reason}"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)  # without the clean-up that would wait for the others


def start_processes(rt, backend):
    """Join the process group that torchrun describes in the environment. A process that dies ends the others."""
    if rt.world_size == 1:
        return
    try:
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=PREPARE_TIMEOUT))
    except (torch.distributed.DistError, ValueError) as error:
        raise RuntimeChoiceError(f"the processes can't meet ({error}); start them by torchrun") from None
    group = torch.distributed.PrefixStore(meet(store, rank, world_size), store)
    backend = backend if rt.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=GROUP_TIMEOUT, world_size=world_size, rank=rank, store=group)


def meet(store, rank, world_size):
    """Wait for all processes, patiently: on another machine one may still prepare its data. Returns the meeting's name.

    torchrun's store outlives a restart, and who took the addresses of the dead out of it would wait for them. So a
    meeting has a name of its own, and counts for a process only if the first one has seen it there.
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
    """The model, or around it what averages the gradients of all processes."""
    if rt.world_size == 1:
        return model
    ids = [rt.device.index] if rt.device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # After its first step DDP orders the gradients anew, and the sum of three or more depends on the order. So that a
    # resumed run sums as an unbroken one does, that happens here, before any step.
    x = torch.zeros(batch_size, block_size, dtype=torch.long, device=rt.device)
    for _ in range(2):
        with rt.autocast():
            wrapped(x, x)[1].backward()
    model.zero_grad(set_to_none=True)
    return wrapped


def leave_processes():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first may still be saving
        torch.distributed.destroy_process_group()


class StopSignal:
    """SIGTERM or Ctrl-C asks to stop after the step in hand: .number is then its number. A second one stops at once.

    Within a second it is the same request: a terminal or a scheduler tells the processes, and so does torchrun.
    """

    def __init__(self):
        self.number, self.at = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if not self.number:
            self.number, self.at = number, time.monotonic()
        elif time.monotonic() - self.at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
