"""How ``hybrid.cu``, a kernel over a whole grid of blocks, finds a model's weights and states."""
