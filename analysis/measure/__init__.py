"""Measuring: time, bytes, exponents, the machine's ceilings, statistics."""
