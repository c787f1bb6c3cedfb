"""The CPU kernels against the oracle, for every instruction set this machine has."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import BackendError
from quantkit.kernels import native, ops, reference
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme, nf4_scheme
from quantkit.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]
ODD_GROUPS = [
    int_scheme(4, 0, True),
    int_scheme(4, 0, False),
    int_scheme(4, 256, True),
    int_scheme(8, 128, True),
    int_scheme(8, 32, True),
    nf4_scheme(128, True),
]
ROWS = (1, 2, 3, 5, 7, 16, 33, 64, 257)
SHAPES = ((1, 8), (16, 64), (33, 172), (64, 576), (7, 301), (40, 1000), (48, 2048), (5, 15))


def random_matrix(
    scheme: QuantScheme, shape: tuple[int, int], scales: torch.dtype, seed: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.01
    return quantize(torch.randn(shape, generator=generator) * rows, scheme, scales)


def integers(weight: QuantizedTensor, rows: int, isa: str) -> tuple[int, int] | None:
    """Return the largest integer that x is taken as, and NF4's steps in [0, 1]; None where x stays as it is."""
    nf4, int8 = weight.scheme.method == "nf4", weight.scheme.bits == 8
    if isa == "avx2" and rows <= 2:
        return (8191, 4096) if nf4 else (32512, 0)
    if isa == "amx" and nf4 and rows <= 2:
        return (32512, 16384)
    whole = isa == "amx" and int8 and weight.shape[1] % 64 == weight.scheme.group % 64 == 0  # tiles of bytes
    if (isa in ("avx512bf16", "amx") and not nf4 and rows <= 2) or whole:
        return (32512, 0)
    return None


def bound(weight: QuantizedTensor, x: torch.Tensor, exact: torch.Tensor, isa: str) -> torch.Tensor:
    """Return how far each result may be from `exact`: (M, N) float64.

    float32: each factor is exact, so only sums round. bfloat16: the result is rounded once more; where a kernel
    rounds NF4's codebook or takes x as blocked integers, what `codebook.h`, `integer.inl` and the engines state.
    """
    matrix = reference.dequantize(weight).double()
    magnitude = x.double().abs() @ matrix.abs().T
    allowed = (weight.shape[1] + 8) * 2.0**-24 * magnitude
    if (
        weight.scheme.method == "int" and not weight.scheme.symmetric
    ):  # sums are taken of codes before zero points
        spread = 16 * weight.scales.double().amax() * x.double().abs().sum(dim=-1, keepdim=True)
        allowed = allowed + (weight.shape[1] + 8) * 2.0**-24 * spread
    if x.dtype == torch.float32:
        return allowed + 1e-30
    allowed = allowed + 2.0**-8 * exact.abs()
    nf4 = weight.scheme.method == "nf4"
    taken = integers(weight, len(x), isa)
    if taken:  # an element of x is off by half a step of its chunk, NF4's codebook by half of one of its own
        limit, steps = taken
        peak = x.double().abs().amax(dim=-1, keepdim=True)
        allowed = allowed + peak / (2 * limit) * matrix.abs().sum(dim=1)
        if steps:
            allowed = allowed + 0.5 / steps / 0.0795 * magnitude
    elif nf4 and isa in ("avx512bf16", "amx"):  # pairs of bfloat16
        allowed = allowed + 0.00157 * magnitude
    return allowed + 1e-30


@pytest.mark.parametrize("scheme", QUANTIZED + ODD_GROUPS, ids=lambda scheme: scheme.name)
def test_every_shape_meets_the_oracle(scheme: QuantScheme, isa: str) -> None:
    dtypes = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    for shape in SHAPES:
        weight = random_matrix(scheme, shape, next(dtypes))
        packed = native.pack([weight])
        matrix = reference.dequantize(weight).double()
        for rows, dtype in itertools.product(ROWS, (torch.float32, torch.bfloat16)):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            exact = x.double() @ matrix.T
            found = native.linear(x, packed)
            assert found.dtype == dtype
            error = (found.double() - exact).abs()
            assert (error <= bound(weight, x, exact, isa)).all(), (shape, rows, dtype)


@pytest.mark.parametrize("scheme", ["int8", "int4-g64-asym", "nf4", "nf4-dq"])
@pytest.mark.parametrize(
    ("shape", "rows"), [((2120, 72), 33), ((17, 16400), 300)], ids=["wide tiles", "several passes"]
)
def test_what_only_large_matrices_take(scheme: str, shape: tuple[int, int], rows: int, isa: str) -> None:
    weight = random_matrix(SCHEMES[scheme], shape, torch.bfloat16)
    packed, matrix = native.pack([weight]), reference.dequantize(weight).double()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fewer, the wider
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, shape[1]).to(dtype)
            exact = x.double() @ matrix.T
            error = (native.linear(x, packed).double() - exact).abs()
            assert (error <= bound(weight, x, exact, isa)).all(), dtype
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scheme", ["int8", "int4-g64-asym", "nf4-dq"])
def test_a_bias_and_leading_dimensions(scheme: str, isa: str) -> None:
    weight = random_matrix(SCHEMES[scheme], (33, 128), torch.bfloat16)
    packed, bias = native.pack([weight]), torch.randn(33)
    x = torch.randn(2, 3, 128)
    expected = reference.linear(x, weight, bias)
    torch.testing.assert_close(ops.linear(x, packed, bias), expected, rtol=1e-4, atol=1e-4)
    assert ops.linear(x[:0], packed).shape == (0, 3, 33)
    strided = torch.randn(4, 256)[:, ::2]
    torch.testing.assert_close(
        ops.linear(strided, packed), reference.linear(strided, weight), rtol=1e-4, atol=1e-4
    )
    half = ops.linear(x.half(), packed)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), reference.linear(x.half().float(), weight), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_matrices_below_each_other_are_one(scheme: QuantScheme) -> None:
    parts = [random_matrix(scheme, (rows, 576), torch.bfloat16, rows) for rows in (64, 16, 32)]
    fused = native.pack(parts)
    assert fused.shape == (112, 576)
    assert fused.nbytes == sum(part.nbytes for part in parts)
    for rows, dtype in itertools.product((1, 2, 9), (torch.float32, torch.bfloat16)):
        x = torch.randn(rows, 576).to(dtype)
        apart = torch.cat([native.linear(x, native.pack([part])) for part in parts], dim=-1)
        assert torch.equal(native.linear(x, fused), apart)


def test_what_cannot_be_fused_is_not() -> None:
    even = random_matrix(SCHEMES["int8"], (16, 64), torch.bfloat16)
    assert not native.fusable([even, random_matrix(SCHEMES["int8"], (10, 64), torch.bfloat16)])
    assert not native.fusable([even, random_matrix(SCHEMES["nf4"], (16, 64), torch.bfloat16)])
    assert not native.fusable([even, random_matrix(SCHEMES["int8"], (16, 64), torch.float16)])
    assert not native.fusable([even, even, random_matrix(SCHEMES["int8"], (16, 72), torch.bfloat16)])
    weight = random_matrix(int_scheme(4, 12, True), (16, 48), torch.bfloat16)
    assert ops.prepare(weight, "native") is weight
    with pytest.raises(BackendError, match="fusable"):
        native.pack([weight])


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_packed_bytes_are_the_canonical_ones_where_nothing_is_ragged(scheme: QuantScheme) -> None:
    weight = random_matrix(scheme, (64, 4096), torch.bfloat16)
    packed = native.pack([weight])
    assert weight.nbytes <= packed.data.nbytes < weight.nbytes + 4 * 64  # each of four panels is padded
    assert packed.nbytes == weight.nbytes


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "int4-g32-asym", "nf4", "nf4-dq"])
def test_threads_and_runs_do_not_change_a_bit(scheme: str, isa: str) -> None:
    packed = native.pack([random_matrix(SCHEMES[scheme], (2128, 512), torch.bfloat16)])
    before = torch.get_num_threads()
    try:
        for rows, dtype in itertools.product((1, 2, 5, 64), (torch.float32, torch.bfloat16)):
            x = torch.randn(rows, 512).to(dtype)
            results = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(native.linear(x, packed))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 15), (33, 172), (64, 4096)])
def test_a_plain_matrix_of_bfloat16(shape: tuple[int, int], rows: int, isa: str) -> None:
    weight, x = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    assert native.takes_plain(x, weight)
    exact = x.double() @ weight.double().T + bias.double()
    magnitude = x.double().abs() @ weight.double().abs().T
    error = (ops.plain_linear(x, weight, bias).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + shape[1] * 2.0**-24 * magnitude + 1e-30).all()


def test_other_plain_matrices_go_to_torch() -> None:
    x, weight = torch.randn(1, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    assert not native.takes_plain(x.float(), weight.float())
    assert not native.takes_plain(x.expand(3, 8), weight)
    assert not native.takes_plain(x, torch.randn(8, 4).bfloat16().T)
    assert not native.takes_plain(x[:0], weight)


def test_operators_have_fakes_that_compile_and_trace_see() -> None:
    packed = native.pack([random_matrix(SCHEMES["nf4-dq"], (48, 128), torch.bfloat16)])
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    arguments = (x, packed.data, None, 48, packed.layout)
    torch.library.opcheck(torch.ops.quantkit.packed_linear.default, arguments)
    plain = (x[:1], torch.randn(16, 128).bfloat16(), None)
    torch.library.opcheck(torch.ops.quantkit.plain_linear.default, plain)
    faked = torch.ops.quantkit.packed_linear(x.to("meta"), packed.data.to("meta"), None, 48, packed.layout)
    assert faked.shape == (3, 48)


class _Seen(TorchDispatchMode):
    """Keeps the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_inference_leaves_the_dispatcher_out_unless_someone_looks() -> None:
    packed = native.pack([random_matrix(SCHEMES["int4-g128"], (48, 128), torch.bfloat16)])
    plain, bias = torch.randn(48, 128).bfloat16(), torch.randn(48).bfloat16()
    operators = {torch.ops.quantkit.packed_linear.default, torch.ops.quantkit.plain_linear.default}
    x = torch.randn(1, 128).bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        return native.linear(x, packed, bias) + native.plain_linear(x, plain, bias)

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    directly, compiled = run(x), torch.compile(run, backend=backend, fullgraph=True)(x)
    with _Seen() as seen:
        looked_at = run(x)
    assert torch.equal(directly, looked_at)
    assert torch.equal(directly, compiled)
    assert operators <= set(seen.operators)
    assert operators <= {getattr(node.target, "default", node.target) for node in graphs[0].graph.nodes}
    assert operators <= {node.target for node in make_fx(run)(x).graph.nodes}


def test_nan_and_infinity_come_through(isa: str) -> None:
    for scheme in ("int8", "int4-g128", "nf4"):
        packed = native.pack([random_matrix(SCHEMES[scheme], (16, 128), torch.bfloat16)])
        for rows, dtype in itertools.product((1, 2, 20), (torch.float32, torch.bfloat16)):
            x = torch.randn(rows, 128).to(dtype)
            x[0, 5] = torch.nan
            assert native.linear(x, packed)[0].isnan().all()
            x[0, 5] = torch.inf
            assert not native.linear(x, packed)[0].isfinite().any()


class TestBadInput:
    """Everything wrong is a Python error that names the argument."""

    @pytest.fixture
    def layout(self) -> Any:
        return native.require().Layout("int4", 32, 128, 64, "bfloat16", True)

    @pytest.fixture
    def parts(self, layout: Any) -> dict[str, Any]:
        weight = random_matrix(SCHEMES["int4-g64-asym"], (32, 128), torch.bfloat16)
        return {
            "codes": weight.codes,
            "scales": weight.scales,
            "zeros": weight.zeros,
            "nested_scales": None,
            "nested_offset": 0.0,
            "out": torch.empty(layout.nbytes, dtype=torch.uint8),
            "threads": 1,
        }

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("codes", torch.zeros(32, 64, dtype=torch.int8), "codes has the wrong dtype"),
            ("codes", torch.zeros(32, 63, dtype=torch.uint8), "codes has 2016 elements, not 2048"),
            ("codes", torch.zeros(64, 64, dtype=torch.uint8)[::2], "codes is not contiguous"),
            ("scales", torch.zeros(32, 2), "scales has the wrong dtype"),
            ("zeros", None, "zeros do not belong"),
            ("zeros", torch.zeros(3, 2, dtype=torch.int32), "zeros has 6 elements"),
            ("nested_scales", torch.zeros(1), "nested_scales do not belong|scales has the wrong dtype"),
            ("out", torch.zeros(10, dtype=torch.uint8), "out has 10 elements"),
            ("threads", 0, "threads must be"),
        ],
    )
    def test_packing(self, layout: Any, parts: dict[str, Any], name: str, value: object, words: str) -> None:
        layout.pack(**parts)
        with pytest.raises(ValueError, match=words):
            layout.pack(**(parts | {name: value}))

    def test_multiplying(self, layout: Any, parts: dict[str, Any]) -> None:
        layout.pack(**parts)
        weight = parts["out"]
        x = torch.zeros(2, 128)
        layout.multiply(weight, x, None, 1)
        aligned = torch.zeros(weight.numel() + 64, dtype=torch.uint8)
        for arguments, words in (
            ((weight, x.double()), "x has the wrong dtype"),
            ((weight, torch.zeros(2, 64)), r"x must have shape \(\.\.\., 128\)"),
            ((weight, torch.zeros(64)), "x must have shape"),
            ((weight, torch.tensor(1.0)), "x must have shape"),
            ((weight, torch.zeros(2, 256)[:, ::2]), "x is not contiguous"),
            ((aligned[1 : weight.numel() + 1], x), "weight is not aligned"),
            ((weight[:-1], x), "weight has"),
        ):
            with pytest.raises(ValueError, match=words):
                layout.multiply(*arguments, None, 1)
        with pytest.raises(ValueError, match="bias has the wrong dtype"):
            layout.multiply(weight, x, torch.zeros(32).double(), 1)
        for not_here in ([[0.0]], x.numpy(), x.to("meta")):
            with pytest.raises(TypeError):
                layout.multiply(weight, not_here, None, 1)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("int5", 16, 64, 64, "bfloat16", False), "kind is 'int5'"),
            (("int4", 0, 64, 64, "bfloat16", False), "rows and cols are 0 x 64"),
            (("int4", 16, 64, 12, "bfloat16", False), "group is 12"),
            (("nf4", 16, 64, 20, "float32", False), "group is 20"),
            (("int8", 16, 64, 64, "uint8", False), "only NF4's are nested"),
            (("int8", 16, 64, 64, "bfloat16", True), "only int4 has zero points"),
            (("int8", 16, 64, 64, "float64", False), "scale is 'float64'"),
            (("nf4", 16, 64, 64, "uint8", False), "map: nested scales, and no others"),
            (("nf4", 16, 64, 64, "float32", False, torch.zeros(256)), "map: nested scales, and no others"),
            (("nf4", 16, 64, 64, "uint8", False, torch.zeros(3)), "map has 3 elements, not 256"),
        ],
    )
    def test_layouts(self, arguments: tuple[object, ...], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            native.require().Layout(*arguments)

    def test_an_unknown_instruction_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QUANTKIT_ISA", "avx1024")
        with pytest.raises(
            ValueError, match="QUANTKIT_ISA=avx1024 cannot run here; this machine has portable"
        ):
            native.require().isa()
        with pytest.raises(BackendError, match="QUANTKIT_ISA=avx1024 cannot run here"):
            native.extension.__wrapped__()


class TestReadingFiles:
    @pytest.mark.parametrize("nbytes", [0, 1, 1000, 3 << 20, (3 << 20) + 7])
    def test_bytes_from_an_offset(self, nbytes: int, tmp_path: Path) -> None:
        content = torch.randint(0, 256, (100 + nbytes,), dtype=torch.uint8)
        (tmp_path / "file").write_bytes(content.numpy().tobytes())
        with (tmp_path / "file").open("rb") as file:
            arena = native.Arena()
            assert torch.equal(arena.read_file(file.fileno(), 50, nbytes), content[50 : 50 + nbytes])
            assert arena.read_file(file.fileno(), 100, nbytes + 9).numel() == nbytes
            out = torch.zeros(nbytes, dtype=torch.uint8)
            assert native.require().read_file(file.fileno(), 100, out, 3) == nbytes
            assert torch.equal(out, content[100:])

    def test_bad_arguments(self, tmp_path: Path) -> None:
        read_file = native.require().read_file
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_file(-1, 0, torch.empty(8, dtype=torch.uint8), 1)
        with pytest.raises(ValueError, match="out has the wrong dtype"):
            read_file(0, 0, torch.empty(8), 1)
        with pytest.raises(ValueError, match="offset must not"):
            read_file(0, -1, torch.empty(8, dtype=torch.uint8), 1)


def test_one_openmp_runtime() -> None:
    """The extension shares torch's: in a process of their own, since other packages bring theirs."""
    code = """
import torch
from quantkit.kernels.native import require
require().available_isas()
torch.ones(1 << 20).sum()
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if "libgomp" in line})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(found.stdout.split()) == 1


def test_backends_are_chosen_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.choose_backend() == "native"
    assert ops.choose_backend("reference") == "reference"
    assert ops.choose_backend(device="cuda") == "reference"
    with pytest.raises(BackendError, match="runs on a CPU, not on cuda"):
        ops.choose_backend("native", "cuda")
    monkeypatch.setattr(native, "extension", lambda: None)
    assert ops.choose_backend() == "reference"
    with pytest.raises(BackendError, match="not built"):
        ops.choose_backend("native")
