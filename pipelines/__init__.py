"""Composition only: definitions, jobs, schedules, sensors, and the command line. Logic lives in `sae_core`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on a busy machine
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large arrays in huge pages: a training step is 7% shorter
