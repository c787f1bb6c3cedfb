"""Which precisions of Mistral-7B-Instruct-v0.2 fit a card of 12 GiB with 32k tokens of context?"""

from __future__ import annotations

from calculators.units import GIB, format_bytes
from quantkit.estimate import Workload, estimate
from quantkit.presets import PRESETS
from quantkit.schemes import default_schemes

CARD = 12 * GIB


def main() -> None:
    model = PRESETS["mistral-7b-instruct-v0.2"]
    for scheme in default_schemes(model.dtype):
        needed = estimate(model, scheme, Workload(context=32768))
        verdict = "fits" if needed.total_bytes <= CARD else "does not fit"
        print(f"{scheme.name:10} {format_bytes(needed.total_bytes):>10}  {verdict}")


if __name__ == "__main__":
    main()
