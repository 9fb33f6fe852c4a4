"""Closed forms: operations, bytes, bounds; each is held against a count or a measurement."""
