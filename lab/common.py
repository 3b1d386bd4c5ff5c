"""What every script shares: the process, the command line, errors and exit codes, atomic files, devices and ranks.

Import it before torch: two settings of the process must be in place by then (see the end of the first section).
torch itself is imported where it is used, so that scripts without a model start without it.
"""

import contextlib
import ctypes
import dataclasses
import functools
import inspect
import io
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import typing
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

if typing.TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------------------------------
# The process: exit codes, errors

DONE = 0
USER_ERROR = 2  # the user must change something: one line on stderr
DIVERGED = 3  # the run diverged, and the log says so
INTERRUPTED = 130  # by Ctrl-C or a signal; the trainer writes a checkpoint first


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, and the command or flag that fixes it."""


class SharedError(UserError):
    """A UserError that every rank raises."""


def run(main):
    """Call `main()` and exit with the code it returns, or as the table above says for UserError, OSError and Ctrl-C.

    Any other exception is a bug and keeps its traceback.
    """
    code = DONE
    for stream in (sys.stdout, sys.stderr):  # names of files and texts that the terminal cannot encode
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or DONE
        sys.stdout.flush()
    except UserError as error:
        code = fail(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # `script | head`: the reader has left, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a closed folder, also of stdout
        where = f"{error.filename}: " if error.filename else ""
        code = fail(f"{where}{error.strerror or error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its buffer cannot be flushed either
    sys.exit(code)


def fail(error):
    """Print the one line of an error. Of one that all ranks meet, rank 0 alone does."""
    if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return USER_ERROR


def exit_now(code):
    """End this process without shutting Python down: for one of several ranks on gloo, when its work is done.

    `destroy_process_group` joins gloo's threads only if nothing refers to the group any more, and default arguments in
    torch.distributed.nn (which DDP imports) and DTensor's cache do. A thread that frees its last tensor while Python
    shuts down sometimes aborts a finished run: "terminate called without an active exception", exit code -6
    (github.com/pytorch/pytorch/issues/190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_quietly_on_interrupt(kind, error, traceback):
    """sys.excepthook: Ctrl-C while a script still imports torch ends with 130 and without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        exit_now(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = exit_quietly_on_interrupt
# Idle OpenMP threads spin briefly, then sleep: beside another busy process long spinning costs several times the step,
# and no spinning a third of it on an idle machine (results/bench/LOG.md). Read when torch loads GNU's OpenMP.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class Stop:
    """Set by SIGTERM, SIGINT or SIGHUP: the loop finishes its step, saves and ends. A second SIGINT ends at once."""

    def __init__(self):
        self.requested = False
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self)

    def __call__(self, signum, frame):
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and world()[0] == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping: a checkpoint is saved first; Ctrl-C again stops without one\n")
        self.requested = True


def keep_freed_memory():
    """Tell glibc to keep freed memory (up to 2 GB) for the next allocation. No effect where there is no glibc.

    A training step on the CPU frees its gradients and allocates them again; without this their pages go back to the
    kernel each time (results/bench/README.md has the page faults).
    """
    if platform.libc_ver()[0] == "glibc":
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3  # mallopt(3)
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the maximum: larger blocks are always mapped anew
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Settings: ranges beside the fields, the command line made from a dataclass


class Range(NamedTuple):
    """The values a setting may have: `Annotated[int, Range(at_least=1)]`. nan lies in no range."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value):
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self):
        limits = ((self.at_least, "at least"), (self.above, "above"), (self.below, "below"))
        words = [f"{word} {limit}" for limit, word in limits if limit is not None and limit != math.inf]
        return " and ".join(words) + (", finite" if self.below == math.inf else "")


Positive = Annotated[int, Range(at_least=1)]
NotNegative = Annotated[int, Range(at_least=0)]
Rate = Annotated[float, Range(at_least=0, below=math.inf)]
Fraction = Annotated[float, Range(at_least=0, below=1)]
AboveZero = Annotated[float, Range(above=0)]  # inf is allowed
FiniteAboveZero = Annotated[float, Range(above=0, below=math.inf)]
Seed = Annotated[int, Range(at_least=0, below=2**63)]
T = TypeVar("T")


@functools.cache
def hints(dataclass):
    """{name: annotation} of a dataclass, Annotated's metadata included."""
    return typing.get_type_hints(dataclass, include_extras=True)


def parts(hint):
    """An annotation and the alternatives inside it: of Annotated[int | None, ...] also int and None."""
    yield hint
    if typing.get_origin(hint) not in (typing.Literal, tuple):
        for inner in typing.get_args(hint):
            yield from parts(inner)


def metadata(hint, kind):
    """What the annotation `hint` holds of this kind."""
    return [item for part in parts(hint) for item in getattr(part, "__metadata__", ()) if isinstance(item, kind)]


def literal_choices(hint):
    """The values of a Literal in the annotation; () where there is none."""
    return next((typing.get_args(part) for part in parts(hint) if typing.get_origin(part) is typing.Literal), ())


def find_bad_setting(settings):
    """(name, what is wrong) of the first field of a dataclass whose value its annotation excludes, or None."""
    for name, hint in hints(type(settings)).items():
        value = getattr(settings, name)
        if value is None:
            if type(None) not in parts(hint):
                return name, "has no value"
            continue
        kinds = {kind for kind in (int, float, bool, str) if kind in parts(hint)}
        choices = literal_choices(hint)
        if value in choices:
            continue
        if choices and not kinds:
            return name, f"must be one of {', '.join(choices)}, not {value!r}"
        if kinds and type(value) not in kinds | ({int} if float in kinds else set()):
            return name, f"must be {' or '.join([*sorted(kind.__name__ for kind in kinds), *choices])}, not {value!r}"
        for limits in metadata(hint, Range):
            if not limits.holds(value):
                return name, f"must be {limits}, not {value}"
    return None


def check_settings(settings):
    """UserError, naming the flag, for the first value outside its range."""
    if bad := find_bad_setting(settings):
        raise UserError(f"--{bad[0]} {bad[1]}")


def parse(args_class, argv=None):
    """Fill the dataclass `args_class` from the command line; the comment beside each field is its help text.

    `--n_exp` and `--n-exp` are the same flag; a bool is `--use_x` / `--no_use_x`.
    Raises UserError for what cannot be parsed, with the nearest flag where one is close.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(args_class))
        sys.exit(DONE)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(args_class, args=argv)
    except SystemExit:
        raise UserError(parse_error(box.getvalue(), argv)) from None
    check_settings(args)
    return args


NANOGPT_FLAGS = {"learning_rate": "max_lr", "batch_size": "B", "max_iters": "max_steps", "warmup_iters": "warmup_steps",
                 "eval_interval": "val_loss_every", "eval_iters": "val_loss_steps", "out_dir": "checkpoint_dir",
                 "dataset": "data_root", "compile": "use_compile", "gradient_accumulation_steps": "total_batch_size",
                 "lr_decay_iters": "max_steps", "block_size": "T"}  # fmt: skip


OLD_WORDS = {"global": "global is called step now, and counts over the micro-batches of the step too"}


def parse_error(box, argv):
    """One line out of tyro's error box: the text between its frame and its first rule (tyro is pinned for this)."""
    lines = [line.strip(" │") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.endswith(("──╮", "────", "----", "──╯"))]
    message = " ".join(filter(None, lines[rules[0] + 1 : rules[1]]))
    if "Unrecognized" in message:
        unknown = [word.lstrip("-").split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
        ours = next((NANOGPT_FLAGS[word] for word in unknown if word in NANOGPT_FLAGS and word in message), None)
        nearest = next((line.split()[0].strip(",") for line in lines[rules[1] :] if re.match("--[a-z]", line)), None)
        if ours or nearest:
            message += f" - did you mean {f'--{ours}' if ours else nearest}?"
        elif any(word.lower().split("=")[-1] in ("true", "false") for word in argv):
            message += " - switches are --flag and --no_flag, without a value"
    message += next((f" - {hint}" for word, hint in OLD_WORDS.items() if f"'{word}'" in message), "")
    return f"{message} (see {os.path.basename(sys.argv[0]).replace('__main__.py', 'python -m bench')} --help)"


def help_text(args_class):
    """The script's docstring, then the settings in the groups and with the comments of the source."""
    comments, groups = {}, {}
    for cls in reversed(args_class.__mro__[:-1]):
        group = "settings"
        for line in inspect.getsource(cls).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
            if field and field[1] in args_class.__dataclass_fields__:
                comments[field[1]] = field[2] or ""
                groups.setdefault(field[1], group)
    lines = [(inspect.getdoc(sys.modules[args_class.__module__]) or "").strip()]
    for group in dict.fromkeys(groups.values()):
        lines += ["", group]
        lines += [setting_help(args_class, name, comments[name]) for name in groups if groups[name] == group]
    return "\n".join(lines)


def setting_help(args_class, name, comment):
    choices = literal_choices(hints(args_class)[name])
    flag = f"--{name}" + (f" {{{','.join(map(str, choices))}}}" if choices else "")
    default = args_class.__dataclass_fields__[name].default
    shown = "" if default in (None, "", ()) or default is dataclasses.MISSING else f" [{default}]"
    return f"  {flag:32} {comment}{shown}"


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or absent, and one writer at a time

TEMP_SUFFIX = ".tmp"  # readers never match it; a leftover of a killed process is overwritten by the next write


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open `path` for writing so that it appears, complete and on disk, only when the block ends without an error.

        with atomic_write("out.json", "w") as f:
            json.dump(result, f)

    Own code, because the kept libraries for this do not fsync the folder, and a rename that is lost loses the file.
    Raises OSError (disk full, no permission); the temporary file is then removed and an older `path` is untouched.
    """
    path = Path(path)
    temp = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with open(temp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def os_error_behind(error):
    """The OSError of a failed write that torch hid behind `error`; `error` itself where there is none."""
    hidden = error
    while hidden and not isinstance(hidden, OSError):
        hidden = hidden.__context__
    return hidden or error


def check_writable(folder, flag):
    """UserError when no file can be written into `folder`, which is made."""
    probe = Path(folder) / f"probe_{os.getpid()}{TEMP_SUFFIX}"  # two runs may start at once
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another {flag}") from None


def check_shared(folder):
    """UserError on a rank that does not see the folder, which rank 0 has made."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} of rank 0 is not there: --fsdp needs a --checkpoint_dir that all ranks share")


@contextlib.contextmanager
def lock(path, remedy):
    """Hold `path`, which need not exist, for this process: any other process gets a UserError that ends in `remedy`.

    The lock is the kernel's, on `<path>.lock`: it ends with the process, however that ends. The file stays, and is no
    obstacle; it names the last holder.
    """
    import filelock

    lock_path = Path(f"{path}.lock")
    held = filelock.FileLock(lock_path)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout:
        holder = "unknown"
        with contextlib.suppress(OSError):  # Windows lets nobody read a locked file
            holder = lock_path.read_text(errors="replace") or holder
        raise UserError(f"{path} is being written by process {holder}; {remedy}") from None
    except OSError as error:
        raise UserError(f"cannot write {lock_path}: {error.strerror}; choose another folder") from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the name is only for the message above
            lock_path.write_text(f"{os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        held.release()


# ---------------------------------------------------------------------------------------------------------------------
# Devices and ranks


def choose_device(name):
    """torch.device of that name; "auto" is the first available of cuda, mps, cpu."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available on this machine: try --device auto") from None


def free_memory(device):
    """Bytes that are free on the device; all memory of the machine, or inf, where the system does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # no Linux
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


class Machine(NamedTuple):
    """Where a run computes: device, type of matrix products, and which of how many ranks this process is."""

    device: "torch.device"
    dtype: "torch.dtype"  # of autocast; float32: no autocast
    rank: int
    world_size: int
    fsdp: bool

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def eval_share(self):
        """(rank, world size) for sharing out evaluation. Under FSDP all ranks do all: each forward needs every rank."""
        return (0, 1) if self.fsdp else (self.rank, self.world_size)

    def autocast(self):
        return autocast(self.device, self.dtype)


def autocast(device, dtype):
    """torch.autocast of matrix products to `dtype`; off for float32."""
    import torch

    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def world():
    """(rank, world size) as torchrun tells it in the environment; (0, 1) without torchrun."""
    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UserError("RANK and WORLD_SIZE in the environment are not numbers: start with torchrun") from None
    if not 0 <= rank < world_size:
        raise UserError(f"RANK {rank} with WORLD_SIZE {world_size} in the environment: start with torchrun")
    return rank, world_size


def gpu_of_rank(local_rank):
    """Name of the GPU of a rank: opened alone, because a context on another one takes memory that its rank needs."""
    import torch

    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if ranks > count:
        raise UserError(
            f"torchrun starts {ranks} processes on this machine, which has {count} GPUs: lower --nproc_per_node"
        )
    return f"cuda:{local_rank}"


def set_up_machine(device, dtype, fsdp=False, timeout_s=600):
    """Machine from the settings of the same names; starts the process group where torchrun started this process."""
    import torch
    import torch.distributed as dist

    rank, world_size = world()
    of_rank = "LOCAL_RANK" in os.environ and torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda")
    device = choose_device(gpu_of_rank(int(os.environ["LOCAL_RANK"])) if of_rank else device)
    if of_rank:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise UserError("RANK is set, MASTER_ADDR is not: start several processes with torchrun")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    bf16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    if device.type != "cuda":
        keep_freed_memory()
    elif not bf16:  # under bf16 the only float32 products left are those of --router_use_full_prec: no TF32 for them
        torch.set_float32_matmul_precision("high")
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, rank, world_size, fsdp)


def parallelize(model, args, machine):
    """Compile the model and wrap it in DDP or FSDP; parameters are shared with `model`.

    Over several ranks, and where backward computes blocks again, each block and the loss are compiled by themselves, in
    place: between blocks gradients are reduced, or parameters gathered, while others are computed. Else the whole model
    is.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    compiled, by_block = is_compiled(args, machine), machine.world_size > 1 or args.recompute == "blocks"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if compiled and machine.device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile_on_cpu needs a C++ compiler: install g++, or leave it out")
    if compiled and by_block:
        for block in model.transformer.h:
            block.forward = torch.compile(block.forward)
        for name in ("cross_entropy", "cross_entropy_with_z_loss"):
            setattr(model, name, torch.compile(getattr(model, name)))
    model.recompute(args.recompute)
    if args.fsdp:
        return shard(model)
    if compiled and not by_block:
        return torch.compile(model)
    if machine.world_size == 1:
        return model
    # Buffers are statistics and the balance bias, which every rank computes alike.
    known = inspect.signature(DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{no_sync: False})


def is_compiled(args, machine):
    return args.use_compile and (machine.device.type == "cuda" or args.compile_on_cpu)


def shard(model):
    """FSDP of a GPT in place: one group of parameters per block and one for the rest. Every rank calls it."""
    import torch.distributed as dist
    from torch.distributed import device_mesh, fsdp

    mesh = device_mesh.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    fsdp.register_fsdp_forward_method(model, "hidden_states")  # HellaSwag and sampling call it without forward()
    return model


@contextlib.contextmanager
def same_on_every_rank():
    """A UserError in this block is one that every rank meets: rank 0 prints it."""
    try:
        yield
    except UserError as error:
        raise SharedError(str(error)) from None


def together(function, machine):
    """function() on every rank; a UserError on any of them is raised by all, with the rank that met it first."""
    import torch.distributed as dist

    result, error = None, None
    try:
        result = function()
    except UserError as caught:
        error = str(caught)
    if machine.world_size > 1:
        errors = [None] * machine.world_size
        dist.all_gather_object(errors, error)
        rank, error = next(((rank, error) for rank, error in enumerate(errors) if error), (0, None))
        error = f"rank {rank}: {error}" if rank else error
    if error:
        raise SharedError(error)
    return result


def from_rank_0(value, machine):
    """Rank 0's `value` on every rank; any value that can be pickled."""
    import torch.distributed as dist

    if machine.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
