"""Dequantize-and-multiply: `ops` chooses a backend, `reference` is the oracle all are held to."""
