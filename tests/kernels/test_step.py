"""The kernels of a decoded token: `step_cases.py` in the interpreter and on a GPU, and compiled without a GPU."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cases import in_the_interpreter_and_on_a_gpu, run_cases
from tests.kernels.ptx_machine import assembled
from tests.kernels.test_triton_compile import SHARED_BYTES, TYPES, Compiled, build
from tests.paths import ROOT

CAPABILITIES = (80, 86, 89, 90, 100)
CACHES = {"bf16": (16, 0), "int8": (8, 1), "int4": (4, 1), "int8-g64": (8, 2), "int4-g32": (4, 4)}
TESTED = {"norm_kernel", "swiglu_kernel", "heads_kernel", "attention_kernel", "combine_kernel"}


@in_the_interpreter_and_on_a_gpu
@pytest.mark.parametrize("file", ["tests/kernels/step_cases.py", "tests/models/cuda_decoder_cases.py"])
def test_a_token_meets_the_operators(file: str, device: str) -> None:
    done = run_cases(file, device)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from quantkit.kernels.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(found: Compiled, capability: int) -> None:
    assert found.usage["STACK"] == found.usage["LOCAL"] == 0, "registers spill"
    assert found.shared_bytes <= SHARED_BYTES[capability]


def make_step(bits: int, groups: int, dtype: torch.dtype, head_dim: int = 128, slots: int = 32768) -> Any:
    from quantkit.kernels.triton.step import Step

    one = torch.empty(1)
    return Step(1, 32, 8, head_dim, slots, bits, groups, dtype, one, one, one)


def attention(capability: int, step: Any) -> Compiled:
    from quantkit.kernels.triton import attention_kernels

    constants, dtype = step.attention_constants(), TYPES[step.dtype]
    words = {1: dtype, 2: "*u8", 4: "*i16", 8: "*i32"}[constants["PER"] * (1 if step.bits == 4 else 2)]
    words = dtype if step.bits == 16 else words
    scales = "*fp16" if step.groups else None
    types = {
        "queries": dtype, "keys": words, "values": words, "key_scales": scales, "value_scales": scales,
        "position": "*i64", "sums": "*fp32", "stats": "*fp32", "slots": "i32", "scale": "fp32",
    }  # fmt: skip
    numbers = {"slots": step.slots}
    return build(attention_kernels.attention_kernel, capability, types, constants, numbers)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("cache", ["bf16", "int8", "int4"])
def test_hopper_reads_keys_16_bytes_at_a_time(cache: str) -> None:
    found = attention(90, make_step(*CACHES[cache], torch.bfloat16))
    check(found, 90)
    copies = found.count("LDGSTS")
    assert copies == found.count("LDGSTS.E.BYPASS.128") > 0, (
        "keys and values are not copied 16 bytes at a time"
    )
    assert found.count("HMMA") > 0
    assert 3 * found.shared_bytes <= SHARED_BYTES[90], "three programs do not share a multiprocessor"


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("capability", "cache", "head_dim"), itertools.product(CAPABILITIES, CACHES, (64, 80, 96, 128, 256))
)
def test_attention_compiles(capability: int, cache: str, head_dim: int, dtype: torch.dtype) -> None:
    bits, groups = CACHES[cache]
    if groups > 1 and head_dim % (128 // groups):
        groups = 1
    check(attention(capability, make_step(bits, groups, dtype, head_dim)), capability)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_heads_compile(cache: str, splits: int) -> None:
    from quantkit.kernels.triton import step_kernels

    step = make_step(*CACHES[cache], torch.bfloat16)
    sums, codes = "*bf16" if splits == 1 else "*fp32", "*u8" if step.groups else "*bf16"
    scales = "*fp16" if step.groups else None
    types = {
        **dict.fromkeys(("q", "k", "v"), sums),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), "*bf16" if splits == 1 else None),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "slots", "tokens"), "i32"),
        **dict.fromkeys(("cosines", "sines", "queries"), "*bf16"),
        **dict.fromkeys(("keys", "values"), codes),
        **dict.fromkeys(("key_scales", "value_scales"), scales),
        "position": "*i64",
    }
    numbers = {"slots": 32768, "tokens": 7}
    # of one decoded token `tokens` is a constant
    constants = step.heads_constants(splits, splits, splits, rows=1) | ({"tokens": 1} if splits == 1 else {})
    for capability in (80, 90):
        check(build(step_kernels.heads_kernel, capability, types, constants, numbers), capability)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("splits", [0, 1, 8])
def test_the_others_compile_and_load_16_bytes(splits: int) -> None:
    from quantkit.kernels.triton import attention_kernels, step, step_kernels

    sums = {0: None, 1: "*bf16"}.get(splits, "*fp32")
    types = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"parts": sums, "bias": None, "eps": "fp32"}
    found = build(step_kernels.norm_kernel, 90, types, step.norm_constants(4096, splits), {})
    check(found, 90)
    assert found.count("LDG.E.128") == found.count("LDG")
    types = {
        **dict.fromkeys(("gate", "up"), sums or "*fp32"),
        **dict.fromkeys(("gate_bias", "up_bias"), None),
        **dict.fromkeys(("gate_stride", "up_stride", "width"), "i32"),
        "out": "*bf16",
    }
    numbers = {"gate_stride": 28672, "up_stride": 28672, "width": 14336}
    for rows in (1, 2048):
        constants = step.swiglu_constants(splits or 1, splits or 1, rows)
        check(build(step_kernels.swiglu_kernel, 90, types, constants, numbers), 90)
    made = make_step(16, 0, torch.bfloat16)
    types = {
        "sums": "*fp32",
        "stats": "*fp32",
        "position": "*i64",
        "out": "*bf16",
        "slots": "i32",
        "splits": "i32",
    }
    numbers = {"slots": made.slots, "splits": made.splits}
    check(build(attention_kernels.combine_kernel, 90, types, made.combine_constants(), numbers), 90)


@pytest.mark.parametrize(("place", "dtype"), [(3, torch.bfloat16), (6, torch.float16)], ids=str)
def test_the_ptx_lays_every_code_over_16(place: int, dtype: torch.dtype) -> None:
    """What the interpreter cannot run, followed on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from quantkit.kernels.triton.attention_kernels import _nibbles

    power = torch.tensor(16, dtype=dtype).view(torch.int16).item()
    words = torch.tensor(list(itertools.product([0x3210, 0x7654, 0xBA98, 0xFEDC, 0x0F5A, 0xFFFF], repeat=2)))
    operands = (words[:, :1] | words[:, 1:] << 16).to(torch.uint32).view(torch.int32)
    found = assembled(_nibbles(place, power), operands, 4)
    halves = torch.stack((found & 0xFFFF, found >> 16 & 0xFFFF), dim=1).to(torch.uint16).view(dtype)
    codes = words[:, :, None] >> 4 * torch.arange(4) & 15
    assert torch.equal(halves, (16 + codes).to(dtype))


def test_no_kernel_is_without_a_test() -> None:
    folder = ROOT / "quantkit" / "kernels" / "triton"
    launched = (folder / "step.py").read_text()
    found = set()
    for file in ("step_kernels.py", "attention_kernels.py"):
        source = ast.parse((folder / file).read_text())
        found |= {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in found if not name.startswith("_")} == TESTED
    assert all(f"kernels.{name}," in launched for name in TESTED)
