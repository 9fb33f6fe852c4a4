"""The selective scan of Mamba-1: its definition, its forms, and native kernels."""
