"""Studies of the models in ``mambabyte``: compute (DataFrames), plot (from DataFrames), report."""
