"""Run folders and records: what a study leaves behind, read and written."""
