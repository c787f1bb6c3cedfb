"""Runs a GGUF file by llama.cpp as `llama.py` asks for it, in a Python that has `llama_cpp` and no quantkit.

Arguments: the file (empty: only say the version), threads, context. Each line on stdin is `{"prefill": [ids]}` or
`{"decode": [ids]}`, answered by a line of JSON on stdout when it is done.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(path: str, threads: str, context: str) -> None:
    """Load the file, say so, and do what each line asks for."""
    import llama_cpp  # type: ignore[import-not-found]

    model: Any = None
    if path:
        model = llama_cpp.Llama(
            path,
            n_ctx=int(context),
            n_batch=512,
            n_threads=int(threads),
            n_threads_batch=int(threads),
            verbose=False,
        )
    answer({"version": llama_cpp.__version__})
    for line in sys.stdin:
        job = json.loads(line)
        if "prefill" in job:
            model.reset()
            model.eval(job["prefill"])
        for token in job.get("decode", ()):
            model.eval([token])
        answer({})


def answer(value: dict[str, str]) -> None:
    """Print a line of JSON."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
