"""Quality of each precision: perplexity over texts."""
