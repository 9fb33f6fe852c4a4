"""The depthwise causal convolution with SiLU: native kernels of it."""
