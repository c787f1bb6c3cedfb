"""How much of a matrix does each precision keep, and at how many bits a weight?"""

from __future__ import annotations

import torch

from quantkit.kernels.reference import dequantize
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)  # trained weights are close to normal, row by row
    for scheme in SCHEMES.values():
        if scheme.quantized:
            packed = quantize(weight, scheme, scale_dtype=torch.bfloat16)
            error = dequantize(packed) - weight
            sqnr = 10 * torch.log10(weight.square().sum() / error.square().sum())
            print(f"{scheme.name:14} {packed.nbytes * 8 / weight.numel():6.3f} bits  {sqnr:6.2f} dB")


if __name__ == "__main__":
    main()
