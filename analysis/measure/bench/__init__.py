"""Benchmarks of whole operators, steps and streams."""
