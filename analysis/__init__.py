"""Studies of the models in ``mambabyte``: compute (DataFrames), plot (from DataFrames), report."""

import os

# torch's profiler, of which the studies read numbers, writes lines of its own about its start.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

# Threads of GNU OpenMP, which torch has on the CPU under Linux, spin while they wait for each
# other, for milliseconds. Where other work takes a core, every region then lasts a time slice of
# the system: a step of a tiny model took 716 ms for 3. Spinning for microseconds keeps both cases
# near their best (docs/log/cpu.md). OpenMP reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
