"""Tests are tiny: one thread each, in this process and in the ones it starts, so that two can run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
