"""The CPU kernels: weights repacked once for the instruction set, then multiplied without being dequantized in memory.

The extension is compiled when the package is installed. Where it was not, `extension()` is None and the
reference kernels run.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType


@lru_cache
def extension() -> ModuleType | None:
    """Return the compiled module, None where there is none."""
    import torch  # noqa: F401  its OpenMP runtime comes first and is shared

    try:
        from quantkit.kernels.native import _native
    except ImportError:
        return None
    return _native
