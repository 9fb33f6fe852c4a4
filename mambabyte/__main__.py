"""``python -m mambabyte``: the command line, which is above this package and finds it."""

import importlib
import sys

sys.exit(importlib.import_module("analysis.cli").main())
