"""Files that are whole or absent: write to a temporary name, fsync, rename. And one writer at a time."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from cli import UserError

TEMP_SUFFIX = ".tmp"  # readers never match it; a leftover of a killed process is overwritten by the next write


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open `path` for writing so that it appears, complete and on disk, only when the block ends without an error.

        with atomic_write("out.json", "w") as f:
            json.dump(result, f)

    Raises OSError (disk full, no permission); the temporary file is then removed and an older `path` is untouched.
    """
    path = Path(path)
    temp = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with open(temp, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def lock(path, remedy):
    """Hold `path`, a file or folder there may not be yet, for this process: any other gets a UserError with `remedy`.

    The lock is the kernel's, on `<path>.lock`: it ends with the process, however that ends; a stale file is
    no obstacle.
    """
    lock_path = Path(f"{path}.lock")
    file = _open_lock(lock_path, remedy)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield
    finally:
        lock_path.unlink(missing_ok=True)  # while still held: whoever opened it meanwhile sees that and tries again
        file.close()


def _open_lock(lock_path, remedy):
    while True:
        try:
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock_path, "a+b")  # noqa: SIM115 - held as long as the lock
        except OSError as error:
            raise UserError(f"cannot write {lock_path}: {error.strerror}; {remedy}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "unknown"
            file.close()
            raise UserError(f"{lock_path.with_suffix('')} is being written by process {holder}; {remedy}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                return file
        file.close()  # the last holder removed the file between our open and our lock
