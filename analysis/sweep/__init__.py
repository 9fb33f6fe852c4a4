"""Runs studies through papermill: one, a grid, here or on many machines."""
