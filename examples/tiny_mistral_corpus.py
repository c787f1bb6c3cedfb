"""Turn Debian's documentation packages into the texts that tiny-mistral is trained on.

    python examples/tiny_mistral_corpus.py DEBS OUT

DEBS is a folder with the packages that tiny_mistral_corpus.json lists: `apt-get download NAME=VERSION` on
Debian 12, or https://snapshot.debian.org for versions that the archive no longer holds. Their SHA-256 are
checked. OUT receives one text file for each, documents parted by lines that hold a form feed alone; the
same packages give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

LIST = Path(__file__).with_suffix(".json")
BLOCKS = {"p", "li", "dt", "dd", "blockquote", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "div", "br"}
SKIPPED = {"script", "style", "nav", "header", "footer", "head", "svg", "table"}
SKIPPED_CLASSES = re.compile(
    r"\b(sphinxsidebar|related|navheader|navfooter|toctree\S*|toc|index|footer|menu|docnav|header|navigation)\b"
)
VOID = {"br", "hr", "img", "input", "link", "meta", "col", "area", "base", "wbr", "source"}
SHORTEST = 400  # characters of a document worth keeping


class Paragraphs(HTMLParser):
    """Collects the paragraphs of a page, navigation and tables left out, `pre` as it is written."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._open: list[str] = []
        self._skipped_at: int | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS or tag == "pre":
            self.end_paragraph()
        if tag in VOID:
            return
        self._open.append(tag)
        classes = next((value or "" for name, value in attrs if name == "class"), "")
        if self._skipped_at is None and (tag in SKIPPED or SKIPPED_CLASSES.search(classes)):
            self._skipped_at = len(self._open)

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS or tag == "pre":
            self.end_paragraph()
        if tag not in self._open:
            return
        while self._open.pop() != tag:
            pass
        if self._skipped_at is not None and len(self._open) < self._skipped_at:
            self._skipped_at = None

    def handle_data(self, data: str) -> None:
        if self._skipped_at is None:
            self._text.append(data)

    def end_paragraph(self) -> None:
        """Close the paragraph at hand."""
        text = "".join(self._text).replace("\u00b6", "").replace("\u00a0", " ")
        self._text = []
        if "pre" in self._open:
            lines = [line.rstrip() for line in text.expandtabs(4).split("\n")]
            text = "\n".join(line for line in lines if line)
        else:
            text = " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)


def read(path: Path) -> str:
    """Return one file's text, paragraphs on lines of their own."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    text = content.decode("utf-8", errors="replace")
    if ".htm" not in path.name:
        return "\n".join(line.rstrip() for line in text.expandtabs(8).splitlines() if line.strip())
    page = Paragraphs()
    page.feed(text)
    page.close()
    page.end_paragraph()
    return "\n".join(page.paragraphs)


def extract(package: Path, patterns: list[str]) -> list[str]:
    """Return the documents of a package whose paths match, without those and those lines seen before."""
    seen: set[str] = set()
    documents = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        root = Path(folder)
        files = {file for pattern in patterns for file in root.glob(pattern) if file.is_file()}
        for file in sorted(files):
            lines = []
            for line in read(file).replace("\f", "").split("\n"):
                if len(line) < 80 or line not in seen:
                    lines.append(line)
                    seen.add(line)
            document = "\n".join(lines)
            if len(document) >= SHORTEST and document not in seen:
                seen.add(document)
                documents.append(document)
    return documents


def main(debs: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for entry in json.loads(LIST.read_text()):
        name, version = entry["package"], entry["version"]
        package = next(debs.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"), None)
        if package is None:
            sys.exit(f"{debs} lacks {name} {version}: apt-get download {name}={version}")
        if hashlib.sha256(package.read_bytes()).hexdigest() != entry["sha256"]:
            sys.exit(f"{package} is not the file that was trained on: its SHA-256 differs")
        documents = extract(package, entry["files"])
        text = "\n\f\n".join(documents) + "\n"
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name:24} {len(documents):6,} documents {len(text.encode()):12,} bytes", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(str(__doc__))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
