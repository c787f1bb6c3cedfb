from __future__ import annotations

import pytest

from quantkit.kernels import native

ISAS = ["portable", "avx2", "avx512", "avx512bf16", "amx"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each instruction set of this machine in turn."""
    if request.param not in native.require().available_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("QUANTKIT_ISA", request.param)
    return str(request.param)
