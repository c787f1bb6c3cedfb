"""What a run really takes: traced without a GPU, measured on one."""
