"""Checks of claims, by what they judge."""
