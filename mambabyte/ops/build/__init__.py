"""What operator families share: C compiled on first use, CUDA C++ by NVRTC, how kernels are launched."""
