"""Checkpoints on disk: Hugging Face directories, quantized or not, and GGUF files."""
