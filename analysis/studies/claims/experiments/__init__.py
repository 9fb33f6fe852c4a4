"""Small experiments that checks read."""
