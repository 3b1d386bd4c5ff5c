"""Files that are whole or absent: write to a temporary name, fsync, rename."""

import contextlib
import os
from pathlib import Path

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
