"""Device, precision, compilation and memory.

What a setting leaves on `auto` is chosen here, and one line says what was chosen and why.
"""

import ctypes
import math
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lib import processes, settings
from lib.settings import UserError

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense 16-bit tensor-core peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets. The more specific
# names come first.
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
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass
class Runtime:
    """Where and how to compute."""

    device: torch.device
    dtype: torch.dtype  # precision of the matrix products
    compile: bool  # whether the model's blocks are compiled
    rank: int  # this process's number among all
    world_size: int  # the number of processes
    restarted: bool  # whether torchrun has started the command again after a failure
    why: str  # the line for the start of the log

    def autocast(self):
        """A `with` in which matrix products are in the precision `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, *arrays):
        """int64 numpy arrays as tensors on the device. The copy to a GPU overlaps with what the GPU computes."""
        tensors = [torch.from_numpy(a).contiguous() for a in arrays]  # Strided memory can't be copied asynchronously.
        if self.device.type != "cuda":
            return [t.to(self.device) for t in tensors]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def peak_flops(self):
        """The device's dense peak at this precision in FLOP/s; 0 where it is not known."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return 0
        name = torch.cuda.get_device_name(self.device)
        if re.search(r" MIG |-\d+[ACQ]$", name):  # This is a part of a card.
            return 0
        return next(
            (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b(?! (Ti|Laptop|D|NVL)\b)", name)), 0
        )

    def memory(self):
        """Bytes of the device's memory; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        memory = 0
        with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf.
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with suppress(OSError, ValueError):  # A container may have a limit. The text "max" means none.
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return memory

    def say(self, line):
        """Print a line. Of several processes only the first one speaks."""
        if self.rank == 0:
            settings.say(line)

    def check_share(self, s):
        """Raise UserError where the micro-batches of a step can't be shared out among the processes.

        s.auto_batch_size makes them anew, so that their sequences are what is shared out.
        """
        unit = self.world_size // math.gcd(self.world_size, s.batch_size if s.auto_batch_size else 1)
        if (steps := s.gradient_accumulation_steps) % unit:
            raise UserError(
                f"gradient_accumulation_steps={steps} counts over all processes together and is not divisible by "
                f"{unit}, as {self.world_size} processes need; "
                f"--gradient_accumulation_steps={math.ceil(steps / unit) * unit}"
            )

    def gather(self, value):
        """The plain values that all processes hold, in the order of their ranks. Each of them calls this."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor):
        """The tensor, summed in place over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def choose(device="auto", dtype="auto", compile="auto", training=False, deterministic=False, rounds_weights=False):
    """The Runtime of this process. Raises UserError for what this machine does not have.

    On a GPU `deterministic` takes the kernels that give the same bits in every run. On a CPU all kernels do.
    `rounds_weights` admits float16 on a CPU, where a program rounds the weights alone.
    """
    reasons = []
    rank, world_size, local_rank, restarts = processes.environment()
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
        reasons.append("the best device here" + " for several processes" * (world_size > 1))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device} is not a device; use auto, cuda, cuda:1, mps or cpu") from None
    if chosen.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"device={device} is not supported; use auto, cuda, cuda:1, mps or cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A scheduler may show each process a GPU of its own. torchrun's processes see the same ones.
        has_its_own = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        index = local_rank if world_size > 1 and not has_its_own else chosen.index or 0
        if index >= count:
            raise UserError(
                f"device={device}: torch {torch.__version__} sees {count} CUDA devices here; use device=cpu, fewer "
                "processes, or a torch and a driver that see the GPU"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has no Apple GPU that torch can use; use device=auto")
    if chosen.type == "mps" and world_size > 1:
        raise UserError(f"device=mps: torch can't have {world_size} processes on an Apple GPU; use one, or device=cpu")

    if dtype == "auto":
        dtype, why = auto_dtype(chosen)
        reasons.append(why)
    if dtype == "float16" and chosen.type != "cuda" and not (rounds_weights and chosen.type == "cpu"):
        raise UserError(f"dtype=float16 needs a CUDA GPU, not {chosen.type}; use float32 or auto")
    if chosen.type == "cpu":
        keep_freed_memory()
        limit_threads()
    if chosen.type == "cuda":
        # People expect TF32 of float32 training on a GPU. All else computes in the precision that it says.
        has_tf32 = training and dtype == "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = has_tf32
        # cuDNN makes a plan for each number of keys, for tens of milliseconds. Only training always has the same one.
        torch.backends.cuda.enable_cudnn_sdp(training)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
            reasons.append("deterministic: slower attention gradients, the same bits in every run")

    if compile == "auto":
        compile, why = auto_compile(chosen)
        reasons.append(why)
    if training or compile:
        try:  # torch's optimizers load _dynamo too. It makes its cache folder while it loads.
            from torch import _dynamo  # noqa: F401
        except OSError as error:
            if not error.filename:  # such as that of a missing library
                raise
            raise UserError(
                f"torch can't make its cache folder ({error}); make room there, or name another by "
                "TORCHINDUCTOR_CACHE_DIR=PATH in the environment"
            ) from None
    line = f"device {chosen}, dtype {dtype}, compile {compile}"
    line += f", {world_size} processes" if world_size > 1 else ""
    line += f" ({'; '.join(reasons)})" if reasons else ""
    return Runtime(chosen, DTYPES[dtype], compile, rank, world_size, restarts > 0, line)


def keep_freed_memory():
    """Have the C library keep the memory that tensors leave. What it hands back is cleared page by page before reuse.

    A step on a CPU would spend some percent of its time on that. All threads share the memory, so that one takes what
    another has left. Only GNU's library has these options.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # The numbers are those of malloc.h.
    with suppress(OSError, AttributeError, TypeError):  # Windows answers with the last one.
        libc = ctypes.CDLL(None)
        # Older versions of the library take no more than 32 MiB for the first value, and answer 0.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)


def limit_threads(limit="/sys/fs/cgroup/cpu.max"):
    """Take no more threads than a container may use cores. torch has one for each core of the machine.

    Those beyond the limit would use up the time of the others, which then stand still until the next period.
    """
    with suppress(OSError, ValueError):  # The text "max" means no limit.
        quota, period = map(int, Path(limit).read_text().split())
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), math.ceil(quota / period)))


def give_back_freed_memory():
    """Have the C library hand back once what it keeps."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def auto_dtype(device):
    """(the name of the precision that `auto` stands for, why)"""
    if device.type != "cuda":
        return "float32", f"float32 is the fast one on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return "bfloat16", f"capability {major}.{minor} has bfloat16 in hardware"
    return "float16", f"capability {major}.{minor} has no bfloat16 in hardware"


def auto_compile(device):
    """(whether `auto` compiles, why)"""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401  torch.compile generates GPU kernels with it
        except ImportError:
            return False, "no triton to compile with"
        return True, "compile pays on a GPU"
    return False, f"compile does not pay on {device.type}"


def least_memory(config, s, rt, batch_size):
    """The bytes without which a training can't be, by arithmetic.

    config: the model's GPTConfig. s: the settings block_size and recompute.
    """
    # Weights, gradients and a moment are float32. A token needs its ids and, for the backward pass, at the very least
    # the inputs of the two branches of each block, or the block's alone where the block is computed again.
    activations = (1 if s.recompute else 2) * config.n_layer * config.n_embd
    return 12 * config.num_params() + batch_size * s.block_size * (16 + activations * rt.dtype.itemsize)


def bytes_beside_gradient(rt):
    """The bytes a parameter that a training keeps beside it and its gradient: two moments, and DDP's own gradient."""
    return 8 if rt.world_size == 1 else 12


def between_blocks(rt, training):
    """The precision of what goes from one block to the next, as GPT.hidden has it."""
    return torch.bfloat16 if training and rt.dtype == torch.bfloat16 else torch.float32


def expected_memory(config, s, rt):
    """The bytes that a training takes about, by arithmetic: of a GPU its tensors, of a CPU the whole process."""
    C, V, item = config.n_embd, config.vocab_size, rt.dtype.itemsize
    tokens = s.batch_size * s.block_size
    # For its backward pass a block keeps the inputs of its norms, products and activation function, and q, k and v.
    block = item * (9 * C + 2 * (config.n_inner or 4 * C))
    between = between_blocks(rt, training=True).itemsize
    blocks = between * C * config.n_layer + block if s.recompute else block * config.n_layer
    logits = min(tokens * V * item, 80e6 if rt.device.type == "cpu" else 1 << 31)
    head = logits + (4 + item) * V * C  # The output layer has a gradient in float32, and its weight a copy.
    torch_itself = 350e6 if rt.device.type == "cpu" else 0
    parameters = (8 + bytes_beside_gradient(rt)) * (config.num_params() + config.block_size * C)
    return parameters + tokens * (blocks + 12 * C) + head + torch_itself


def check_memory(config, s, rt):
    """Raise UserError for a training that can't fit: better at once than killed by the system after minutes."""
    batch_size = 1 if s.auto_batch_size else s.batch_size
    if (needed := least_memory(config, s, rt, batch_size)) > rt.memory() > 0:
        raise UserError(
            f"{config.num_params() / 1e6:,.0f} M parameters and {batch_size * s.block_size:,} tokens in a "
            f"micro-batch take more than {needed / 2**30:,.0f} GiB, {rt.device} has {rt.memory() / 2**30:,.0f}; take a "
            f"smaller n_layer, n_embd, n_inner or {'batch_size' if batch_size > 1 else 'block_size'}"
        )


def compile_parts(model, rt, batch_size, block_size):
    """Where rt.compile is set, compile the model's blocks and its loss, and try them on the shape to come.

    Where that fails, say so and stay eager. One block is enough to find out, since the others share its compiled graph.
    That graph is for training or for evaluation, as the model's mode is. An evaluation has no loss to compile.
    """
    if not rt.compile:
        return
    block, training = model.transformer.h[0], model.training
    dtype = between_blocks(rt, training)
    h = torch.zeros(batch_size, block_size, model.config.n_embd, device=rt.device, dtype=dtype)
    if rt.device.type == "cpu":
        # Inductor would test for seconds whether the compiler makes vector code. A compiler that fails is met below.
        torch._inductor.config.cpp.vec_isa_ok = True
    model.compile_parts()
    try:
        with rt.autocast(), torch.set_grad_enabled(training):
            y = block(h.requires_grad_(training))
            if training:
                model.cross_entropy(y, torch.zeros_like(y[..., 0], dtype=torch.long)).backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        model.uncompile_parts()
        torch._dynamo.reset()
        reason = settings.brief(error)
        settings.say(f"compile failed ({type(error).__name__}: {reason}); going on without it")
    finally:
        model.zero_grad(set_to_none=True)


def is_out_of_memory(error):
    """Whether an error says that memory ran out. Not all of torch's are of a class of their own."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        says in text for says in ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    )


@contextmanager
def memory_advice(advice, *args):
    """Raise a UserError that ends in the text advice(*args) where memory runs out within the `with`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory{advice(*args)}") from None
