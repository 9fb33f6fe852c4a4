"""Study: how many bytes one training step needs."""
