"""What torch.compile would join of a training step, as kernels of our own."""
