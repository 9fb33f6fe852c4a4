"""The cases of the GPU tests serve the emulated kernels as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "gpu"))
