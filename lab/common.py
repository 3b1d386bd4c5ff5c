"""Errors and exit codes, settings and their ranges, files that are whole or absent. What every script shares.

Scripts import this before torch, for the two settings of the process at the end of the first section.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import typing
from pathlib import Path
from typing import Annotated, NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# The process: exit codes and errors

DONE = 0
USER_ERROR = 2  # the user must change something: one line on stderr, no traceback
DIVERGED = 3  # the run diverged; the log says so
INTERRUPTED = 130  # by Ctrl-C or a signal; the trainer writes a checkpoint first


class UserError(Exception):
    """A mistake that the user can fix. The message says what is wrong and which flag or command fixes it."""


def run(main):
    """Call `main()` and exit with the code it returns. Any exception but those below is a bug and keeps its traceback.

    Of several ranks, rank 0 alone prints the error: all of them meet it.
    """
    code = DONE
    try:
        code = main() or DONE
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # `script | head`: the reader has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR
    if os.environ.get("WORLD_SIZE", "1") != "1":
        exit_now(code)
    sys.exit(code)


def exit_now(code):
    """End this process without shutting Python down.

    One of several ranks may otherwise abort a finished run: a thread of gloo or NCCL that frees its last tensor while
    Python shuts down raises "terminate called without an active exception" (github.com/pytorch/pytorch/issues/190489).
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def before_main(kind, error, traceback):
    """sys.excepthook, for what happens while a script is imported: Ctrl-C in `import torch`, a wrong edit of Args."""
    if issubclass(kind, KeyboardInterrupt):
        exit_now(INTERRUPTED)
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
        exit_now(USER_ERROR)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = before_main
# Idle OpenMP threads spin briefly, then sleep: beside another busy process long spinning makes a step several times
# as slow. Read when torch loads GNU's OpenMP.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class Stop:
    """Set by SIGTERM, SIGINT or SIGHUP: the loop finishes its step, saves and ends. A second SIGINT ends at once.

    Of several ranks one may be told alone. They tell each other in a step, and leave together once all have `agreed`.
    """

    def __init__(self, agreed=True):
        self.requested, self.agreed = False, agreed
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self)

    @property
    def now(self):
        return self.requested and self.agreed

    def __call__(self, signum, frame):
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping: a checkpoint is saved first; Ctrl-C again stops without one\n")
        self.requested = True


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a dataclass whose annotations hold the range of each field; the command line is made from it


class Range(NamedTuple):
    """The values that a number may have: `Annotated[int, Range(at_least=1)]`. nan lies in no range."""

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.nan  # nan: no limit, inf allowed

    def holds(self, value):
        in_reach = value >= self.at_least and (value > self.above or self.above == -math.inf)
        return in_reach and (value < self.below or math.isnan(self.below))

    def __str__(self):
        limits = {"at least": self.at_least, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit > -math.inf)


Positive = Annotated[int, Range(at_least=1)]
NotNegative = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, below=2**63)]
Rate = Annotated[float, Range(at_least=0, below=math.inf)]
Fraction = Annotated[float, Range(at_least=0, below=1)]
AboveZero = Annotated[float, Range(above=0)]  # inf is allowed
FiniteAboveZero = Annotated[float, Range(above=0, below=math.inf)]


def check_ranges(settings):
    """ValueError, naming the field, for the first value of a dataclass that its annotation excludes."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        # Of `Positive | None` the hint of the union's first member counts.
        options = [hint] if hasattr(hint, "__metadata__") else typing.get_args(hint)
        limits = [limit for option in options for limit in getattr(option, "__metadata__", ())]
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for limit in limits:
            if isinstance(value, (int, float)) and not limit.holds(value):
                raise ValueError(f"{name} must be {limit}, not {value}")


def settings(cls):
    """@dataclass in which `top_k = 1`, without a type, edits the setting of that name, as nanoGPT's users write it.

    The type is that of the inherited setting, else that of the value. UserError for a name that no code reads.
    """
    inherited = {}
    for base in reversed(cls.__mro__[1:]):
        inherited |= vars(base).get("__annotations__", {})
    own = dict(vars(cls).get("__annotations__", {}))
    files = [Path(sys.modules[cls.__module__].__file__), *Path(__file__).parent.glob("*.py")]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    for name, value in list(vars(cls).items()):
        if name.startswith("_") or name in own or callable(value) or hasattr(value, "__get__"):
            continue
        if name not in inherited and not re.search(rf"\bargs\.{name}\b", sources):
            raise UserError(f"{cls.__name__}.{name} is no setting: nothing reads it; --help lists the settings")
        own[name] = inherited.get(name, type(value))
    cls.__annotations__ = own
    return dataclasses.dataclass(cls)


def parse(cls, argv=None, default=None, unknown=False):
    """The dataclass `cls` filled from the command line; the comment beside each field is its help text.

    `--n_exp` and `--n-exp` are the same flag; a bool is `--use_x` / `--no_use_x`. `default`: values of flags that are
    not given. `unknown`: return (settings, flags that `cls` does not have). UserError for a value out of its range.
    """
    import tyro

    doc = sys.modules[cls.__module__].__doc__
    try:
        found = tyro.cli(
            cls, args=argv, default=default, description=doc, use_underscores=True, return_unknown_args=unknown
        )
        check_ranges(found[0] if unknown else found)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or absent, and one writer at a time

TEMP_SUFFIX = ".tmp"  # no reader matches it; a leftover of a killed process is overwritten by the next write


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open `path` for writing so that it appears, complete and on disk, only when the block ends without an error.

    On an error (disk full, no permission) the temporary file is removed and an older `path` is untouched.
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


@contextlib.contextmanager
def lock(path, remedy):
    """Hold the lock file `path`; UserError where another process has it. A folder that stays empty goes with it."""
    import filelock

    held, folder = filelock.FileLock(path), Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{path} is held by another process: {remedy}") from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        held.release()
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
            folder.parent.rmdir()
