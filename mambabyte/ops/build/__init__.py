"""C compiled on first use and CUDA C++ through NVRTC; the headers that families share."""
