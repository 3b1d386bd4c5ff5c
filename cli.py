"""What the scripts share as programs: one parser made from a dataclass, one kind of error, exit codes, memory kept.

0    done
2    the user must change something: one line on stderr, `error: what is wrong, and what mends it`
3    the run diverged (train_single_gpu.py returns it)
130  interrupted
"""

import contextlib
import ctypes
import io
import os
import platform
import re
import sys

import tyro


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and the command or flag that mends it."""


def parse(args_class, argv=None):
    """Fill the dataclass `args_class` from the command line; the comment beside each field is its help text.

    `--n_exp` and `--n-exp` are the same flag; a bool is `--use_x` / `--no_use_x`.
    Raises UserError for what cannot be parsed, with the nearest flag where one is close.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(args_class, args=argv)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
    # tyro explains itself in a box, of lines or of plain ASCII: take what stands between its frame and its first rule.
    lines = [line.strip(" │") for line in box.getvalue().splitlines()]
    rules = [i for i, line in enumerate(lines) if line.endswith(("──╮", "────", "----", "──╯"))]
    message = " ".join(filter(None, lines[rules[0] + 1 : rules[1]]))
    nearest = next((line.split()[0] for line in lines[rules[1] :] if re.match("--[a-z]", line)), None)
    if nearest and "Unrecognized" in message:
        message += f" - did you mean {nearest}?"
    raise UserError(f"{message} (see {os.path.basename(sys.argv[0])} --help)")


def run(main):
    """Call `main()` and exit as the table above says. Anything that is not the user's to mend keeps its traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `script | head`: the reader has left, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def exit_now(code):
    """End this process without shutting Python down: for one of several that talk over gloo, when its work is done.

    `destroy_process_group` joins gloo's threads only if nothing refers to the group any more, and default arguments in
    torch.distributed.nn (which DDP imports) and DTensor's cache do. A thread that frees its last tensor while Python
    shuts down aborts a run that has gone well, now and then: "terminate called without an active exception", exit code
    -6 (github.com/pytorch/pytorch/issues/190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_freed_memory():
    """Tell glibc to keep freed memory (up to 2 GB) for what is allocated next. No effect where there is no glibc.

    A training step on the CPU frees its gradients and allocates them again. Without this their pages go back to the
    kernel each time: 35,000 page faults a MoE step, 0 to 16,000 a dense one (results/bench/README.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3  # mallopt(3)
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most it takes: what is larger is mapped anew
        libc.mallopt(m_trim_threshold, 2**31 - 1)
