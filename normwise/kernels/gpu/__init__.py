"""The kernels for GPUs, in Triton: by memory word, as those for the CPU."""
