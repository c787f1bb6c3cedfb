"""How fast quantized models run on a CUDA GPU, beside what it could do at most and beside others' kernels."""
