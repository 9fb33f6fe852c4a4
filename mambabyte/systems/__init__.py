"""Submission files of the public task, one a system; each runs unmodified under its harness."""
