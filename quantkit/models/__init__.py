"""Running a model: forward pass, KV cache, tokenizer, generation."""
