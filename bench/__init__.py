"""python -m bench: see __main__.py. Here: settings of the process that must be in place before torch is loaded."""

import os

from lab import common  # noqa: F401 (sets how idle OpenMP threads wait)

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each use of the profiler prints two lines to stderr
