"""A whole model, byte after byte, in one kernel."""
