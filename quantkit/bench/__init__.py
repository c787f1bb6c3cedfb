"""How fast quantized models run on this machine, beside what it could do at most and beside others' kernels."""
