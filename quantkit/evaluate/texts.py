"""Texts to evaluate on: one that every CPython carries, a file, or WikiText-2 from the Hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError

DATASETS = ("wikitext2",)


@dataclass(frozen=True)
class Text:
    """A text, what to call it, and the SHA-256 of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def python_reference() -> Text:
    """Return the Python language reference that `help()` prints from: `pydoc_data.topics`.

    Its wording changes with the Python version, so results compare only under one hash.
    """
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))


def text_file(path: Path) -> Text:
    """Return a UTF-8 text file as it is, its line ends and a byte order mark, too.

    Raises:
        QuantkitError: it cannot be read, or is not UTF-8.
    """
    try:
        return Text(path.name, path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{path} is not UTF-8 text: byte {error.start:,} cannot be decoded") from None
    except OSError as error:
        raise QuantkitError(f"{path} cannot be read: {error.strerror}") from None


def hub_dataset(name: str) -> Text:
    """Return the WikiText-2 raw test split, rows joined by blank lines as GPTQ-style evaluations do.

    Raises:
        QuantkitError: the `datasets` package is absent, or the Hub cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise QuantkitError(
            f"--dataset {name} needs the datasets package: pip install 'quantkit[hub]'"
        ) from None
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:  # the hub client raises many kinds, none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuantkitError(
            f"{name} cannot be fetched from the Hub ({reason}); use --text FILE offline"
        ) from error
    return Text("wikitext-2-raw-v1 test, joined by blank lines", "\n\n".join(rows))
