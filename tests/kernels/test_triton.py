"""The CUDA kernels: their choice, their layout, and `triton_cases.py` in the interpreter and on a GPU."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from quantkit.errors import BackendError
from quantkit.kernels import ops, reference
from quantkit.kernels import triton as kernels
from quantkit.kernels.triton import nf4_ptx
from quantkit.kernels.triton.layout import tile_cols
from quantkit.quantize import quantize
from quantkit.quantize.nf4 import NF4_CODEBOOK
from quantkit.quantize.packing import unpack_zeros
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme
from quantkit.tensor import QuantizedTensor, empty_quantized
from tests.paths import ROOT

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]


def random_matrix(scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme, torch.bfloat16)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_kernels_meet_the_oracle(device: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible to PyTorch")
    program = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/triton_cases.py",
    ]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, quantkit.models.loader;"
        "from quantkit.kernels import triton; print(triton.packs.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "quantkit.kernels.triton", done.stderr


@pytest.mark.parametrize("shape", [(1, 8), (33, 256), (9, 301)])
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_every_code_lies_where_the_drawing_says(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_matrix(scheme, shape)
    packed = kernels.pack([weight])
    tiles, (rows, cols), bits = packed.tiles, shape, scheme.bits
    n, k = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    words = tiles.codes[k // tile_cols(bits), n, k % 16].long()
    codes = words >> (k % tile_cols(bits) // 16 * bits) & (2**bits - 1)
    if scheme.method == "nf4":
        found = torch.tensor(NF4_CODEBOOK)[codes]
        ones = torch.ones(weight.scales.shape)  # an absmax of 1
        plain = QuantizedTensor(SCHEMES["nf4"], shape, weight.codes, ones)
        assert torch.equal(found, reference.dequantize(plain))
    else:
        group = k // (tiles.group or cols)
        zeros = 2 ** (bits - 1) if weight.zeros is None else unpack_zeros(weight.zeros, rows)[n, group]
        if tiles.zeros is not None:
            assert torch.equal(tiles.zeros[group, n // 8] >> (n % 8 * 4) & 15, zeros.int())
        found = (codes - zeros) * tiles.scales.float()[group, n]
        assert torch.equal(found, reference.dequantize(weight))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_tiles_take_no_more_bytes_where_nothing_is_ragged(scheme: QuantScheme) -> None:
    weight = random_matrix(scheme, (64, 512))
    packed = kernels.pack([weight])
    parts = [part for part in vars(packed.tiles).values() if isinstance(part, torch.Tensor)]
    assert sum(part.nbytes for part in parts) == packed.nbytes == weight.nbytes
    assert packed.shape == (64, 512)
    assert packed.device == weight.device


def test_what_cannot_be_packed_stays_for_the_reference() -> None:
    weight = random_matrix(int_scheme(4, 12, True), (16, 48))
    assert ops.prepare(weight, "triton") is weight
    with pytest.raises(BackendError, match="fusable"):
        kernels.pack([weight])
    assert kernels.packs(SCHEMES["int8"], (1 << 16, (1 << 15) - 64))
    assert not kernels.packs(SCHEMES["int8"], (1 << 16, 1 << 15))  # 2**31 elements
    huge = empty_quantized((1 << 17, 1 << 15), SCHEMES["int4-g128"], torch.bfloat16, "meta")
    assert ops.prepare(huge, "triton") is huge


def test_what_cannot_be_fused_is_not() -> None:
    even = random_matrix(SCHEMES["int8"], (16, 64))
    assert kernels.fusable([even, random_matrix(SCHEMES["int8"], (10, 64))])
    assert not kernels.fusable([even, random_matrix(SCHEMES["nf4"], (16, 64))])
    assert not kernels.fusable([even, random_matrix(SCHEMES["int8"], (16, 72))])
    nested, across = (
        random_matrix(SCHEMES[name], shape) for name, shape in (("nf4-dq", (16, 64)), ("nf4", (16, 72)))
    )
    assert not kernels.fusable([nested, nested])
    assert not kernels.fusable([across, across])
    odd = random_matrix(SCHEMES["int4-g32-asym"], (10, 64))
    assert not kernels.fusable([odd, odd])
    assert ops.fuse([odd, odd], "triton") is None


def test_on_a_cpu_the_operator_says_what_it_needs() -> None:
    packed = ops.prepare(random_matrix(SCHEMES["int8"], (16, 64)), "triton")
    with pytest.raises(BackendError, match="run on a CUDA GPU where Triton is installed, not on cpu"):
        ops.linear(torch.randn(1, 64), packed)


class TestChoice:
    """Of a backend; the GPU is pretended."""

    @pytest.fixture(autouse=True)
    def _hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops._say_once.cache_clear()
        monkeypatch.setattr(ops, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def test_a_gpu_runs_triton(self) -> None:
        assert ops.choose_backend("auto", "cuda") == "triton"
        assert ops.choose_backend("triton", "cuda:1") == "triton"
        assert ops.choose_backend("reference", "cuda") == "reference"
        with pytest.raises(BackendError, match="cannot run on cpu: it needs a CUDA GPU"):
            ops.choose_backend("triton", "cpu")

    @pytest.mark.parametrize(
        ("lacking", "words"),
        [
            ("triton", "Triton is not installed"),
            ("gpu", "no CUDA GPU is visible to PyTorch"),
            ("rocm", "PyTorch was built for ROCm"),
            ("capability", "its compute capability is 7.0, and the kernels need 7.5"),
        ],
    )
    def test_what_is_lacking_is_said(
        self, lacking: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        if lacking == "triton":
            monkeypatch.setattr(ops, "find_spec", lambda name: None)
        elif lacking == "gpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        elif lacking == "rocm":
            monkeypatch.setattr(torch.version, "hip", "7.0")
        else:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        with pytest.raises(BackendError, match=f"the triton backend cannot run on cuda: {words}"):
            ops.choose_backend("triton", "cuda")
        with caplog.at_level(logging.WARNING, "quantkit"):
            assert [ops.choose_backend("auto", "cuda") for _ in range(2)] == ["reference"] * 2
        assert len(caplog.messages) == 1
        assert words in caplog.text
        assert "slow reference" in caplog.text


class TestPtx:
    """The instructions that unpack NF4, followed one by one: what the interpreter cannot run."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_code_at_every_place(self, dtype: torch.dtype) -> None:
        bits = [value & 0xFFFF for value in torch.tensor(NF4_CODEBOOK).to(dtype).view(torch.int16).tolist()]
        codes = torch.randint(0, 16, (64, 2, 8), generator=torch.Generator().manual_seed(0)).tolist()
        codes += [[[code] * 8, [15 - code] * 8] for code in range(16)]
        for pair in codes:
            words = [sum(code << (4 * place) for place, code in enumerate(word)) for word in pair]
            found = follow(nf4_ptx.unpack(dtype), words)
            assert found == [bits[pair[0][place]] | bits[pair[1][place]] << 16 for place in range(8)]

    def test_constraints_are_of_the_operands(self) -> None:
        operands = set(re.findall(r"\$\d+", nf4_ptx.unpack(torch.bfloat16)))
        assert operands == {f"${i}" for i in range(len(nf4_ptx.CONSTRAINTS.split(",")))}


def follow(program: str, words: list[int]) -> list[int]:
    """Return what $0 to $7 hold after a program of the five instructions below, which gets words in $8 and $9."""
    held = {"$8": words[0], "$9": words[1]}

    def value(operand: str) -> int:
        return held[operand] if operand in held else int(operand, 0)

    for line in program.strip("{}").split(";"):
        instruction, *operands = line.replace(",", " ").split() or [".reg"]
        if instruction == ".reg":
            continue
        into, (first, second, *rest) = operands[0], [value(operand) for operand in operands[1:]]
        if instruction == "shr.u32":
            held[into] = first >> second
        elif instruction == "and.b32":
            held[into] = first & second
        elif instruction == "or.b32":
            held[into] = first | second
        else:
            assert instruction == "prmt.b32"
            held[into] = permute(first, second, rest[0])
    return [held[f"${i}"] for i in range(8)]


def permute(a: int, b: int, selection: int) -> int:
    """PTX ISA, `prmt`: each nibble of the selection picks a byte of {b, a}; its high bit copies the sign instead."""
    source, result = a | b << 32, 0
    for place in range(4):
        nibble = selection >> (4 * place) & 15
        byte = source >> (8 * (nibble & 7)) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * place)
    return result
