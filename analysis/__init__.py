"""Studies of the models in ``mambabyte``: compute (DataFrames), plot (from DataFrames), report."""

import os

# Threads of OpenMP, which torch uses on the CPU, spin while they wait for each other. Where other
# work takes a core, each region then waits for a time slice of the system: training a tiny model
# took 29 s for 0.1 s (LOG.md). OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
