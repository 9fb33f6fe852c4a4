"""Mamba-3's scan on top of SSD: its turning states, and both ends of its steps."""
