"""quantkit: what a language model costs in GPU memory at each precision, and what that does to it."""

__version__ = "0.1.0"
