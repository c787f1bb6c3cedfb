"""GPUs that people have, and what a process takes of one before it allocates its first tensor.

A card is sold in "GB" that mean about GiB, and CUDA reports less than that as the device's memory, less also
than nvidia-smi does: an RTX 4090 has 24 GiB on the box, 24564 MiB in nvidia-smi and 23.52 GiB in CUDA. How
much less depends on the driver, on ECC and on the system (on Windows hardly any is missing), so that the
figures here are the smallest common ones; those that PyTorch prints are rounded to 0.01 GiB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from calculators.units import GIB, MIB

_FAMILIES = {
    (7, 0): "volta",
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (12, 0): "blackwell",
}


@dataclass(frozen=True)
class GPU:
    """One model of card.

    Attributes:
        name: as people call it.
        capability: compute capability, major and minor.
        sm_count: streaming multiprocessors, as NVIDIA's datasheets give them.
        sold_gb: the figure on the box.
        usable_bytes: the device's memory as software reports it.
        usable_source: URL of where somebody saw it reported, or a record of this project.
        bandwidth_gb_s: of its memory, in 10**9 bytes per second, as advertised.
        bandwidth_source: URL.
        aliases: other names of it.
        usable_is: `cuda` where CUDA reported it; `nvidia-smi`, which reports more, where only that is known.
    """

    name: str
    capability: tuple[int, int]
    sm_count: int
    sold_gb: int
    usable_bytes: int
    usable_source: str
    bandwidth_gb_s: float
    bandwidth_source: str
    aliases: tuple[str, ...] = ()
    usable_is: str = "cuda"

    @property
    def family(self) -> str:
        """The architecture, such as `ada`."""
        return _FAMILIES[self.capability]


def _gib(size: float) -> int:
    return round(size * GIB)


_GITHUB = "https://github.com/"
_SIRUS = "https://sirusgaming.com/nvidia-official-reveal-3000-series/"
_TWEAKTOWN = (
    "https://www.tweaktown.com/news/102469/"
    "nvidia-geforce-rtx-50-series-specs-pricing-and-performance-plan-that-upgrade-today/index.html"
)
_ALLDBIN = "https://cpu-gpu.alldbin.com/graphics-card-comparison/"
_YOTTA = "https://www.yottalabs.ai/post/which-nvidia-rtx-6000-gpu-is-right-for-you-in-2026"
_V100 = f"{_GITHUB}ai-infra-learning/docs/pull/11"
_A100 = "https://www.svethardware.cz/nvidia-predstavila-akcelerator-a100-s-80-gb-rychle-pameti/55366"
_H100 = (
    "http://www3.anandtech.com/Show/Index/18780?cPage=1&all=False&sort=0&page=1"
    "&slug=nvidia-announces-h100-nvl-max-memory-server-card-for-large-language-models"
)
_H200 = "reports/measured/mistral-7b-h200.json"  # a record of this project

_CONSUMER = (
    GPU("RTX 2080 Ti", (7, 5), 68, 11, _gib(10.76), f"{_GITHUB}JDAI-CV/image-captioning/issues/11",
        616, "https://www.newyorkmetropolitan.com/tech/nvidia-rtx-2080-and-2080-ti-review-a-tale-of-two-very-expensive-graphics-cards"),
    GPU("RTX 3060 12GB", (8, 6), 28, 12, _gib(11.75), f"{_GITHUB}PromtEngineer/localGPT-Vision/issues/14",
        360, "https://thinkcomputers.org/nvidia-finally-introduces-geforce-rtx-3060-8gb-and-rtx-3060-ti-gddr6x/",
        ("RTX 3060",)),
    GPU("RTX 3080 10GB", (8, 6), 68, 10, _gib(9.78), f"{_GITHUB}zai-org/CogVideo/issues/34", 760, _SIRUS,
        ("RTX 3080",)),
    GPU("RTX 3090", (8, 6), 82, 24, _gib(23.56), f"{_GITHUB}wtdcode/vllm-backport/issues/34", 936, _SIRUS),
    GPU("RTX 4060", (8, 9), 24, 8, _gib(7.63), f"{_GITHUB}AIRI-Institute/HairFastGAN/issues/8",
        272, "https://techtodayindia.com/nvidia-rtx-4060-a-detailed-review-of-the-budget"),
    GPU("RTX 4070", (8, 9), 46, 12, 12282 * MIB, f"{_GITHUB}Frogging-Family/nvidia-all/pull/212",
        504, "https://www.aroged.com/2024/08/05/updated-geforce-rtx-4070-to-get-20-gt-s-gddr6-chips/",
        usable_is="nvidia-smi"),
    GPU("RTX 4070 Ti", (8, 9), 60, 12, _gib(11.70), f"{_GITHUB}Kwai-Kolors/Kolors/issues/11",
        504, "https://praeco-medii-aevi.de/nvidia-geforce-rtx-4070-ti-test-verkauft-um-mit-1440p-zu-spielen-und-4k-ist-nicht-einschuechternd"),
    GPU("RTX 4080", (8, 9), 76, 16, 16076 * MIB, f"{_GITHUB}ollama/ollama/issues/9245",
        716.8, "https://db.thegpu.guru/card/RTX%204080"),
    GPU("RTX 4090", (8, 9), 128, 24, _gib(23.52), f"{_GITHUB}pytorch/torchchat/issues/1341",
        1008, "https://csstricks.net/geforce-rtx-50-graphics-cards-important-details-leaked/"),
    GPU("RTX 5060 Ti 16GB", (12, 0), 36, 16, 15816 * MIB, f"{_GITHUB}Luce-Org/lucebox/issues/407",
        448, "https://www.techpowerup.com/review/gainward-geforce-rtx-5060-ti-8-gb"),
    GPU("RTX 5070", (12, 0), 48, 12, 12227 * MIB, f"{_GITHUB}llm-d/llm-d-deployer/issues/282",
        672, "https://thetechfeed.site/rtx-50-series-compared-to-prior-gen-what-we-know-so-far-custom-gaming-workstation-pc-blog",
        usable_is="nvidia-smi"),
    # CUDA's figure on Windows, the only one found: Linux reports less.
    GPU("RTX 5080", (12, 0), 84, 16, _gib(15.92), f"{_GITHUB}Comfy-Org/ComfyUI/issues/12360", 960, _TWEAKTOWN),
    GPU("RTX 5090", (12, 0), 170, 32, 33_677_180_928, f"{_GITHUB}aikitoria/open-gpu-kernel-modules/issues/1",
        1792, _TWEAKTOWN),
)  # fmt: skip

_WORKSTATION = (
    GPU("RTX A4000", (8, 6), 48, 16, _gib(15.61), f"{_GITHUB}DengKaiCQ/VGGT-Long/issues/6",
        448, "https://www.ecer.com/corp/details-uuuedqa-p1bsb03-pci-express-3-0-x16-nvidia-rtx-a4000-16g-graphics-card-for-professional-video-editing.html"),
    GPU("RTX A6000", (8, 6), 84, 48, _gib(47.54), f"{_GITHUB}google-research/semivl/issues/18",
        768, "https://servethehome.com/nvidia-rtx-a6000-48gb-gpu-drops-quadro-designation"),
    # Without ECC; with it CUDA reports 44.43 GiB: https://github.com/DINGYANB/MTVCrafter/issues/21
    GPU("RTX 6000 Ada", (8, 9), 142, 48, 50_865_307_648, f"{_GITHUB}unslothai/unsloth-zoo/pull/1053",
        960, _YOTTA, ("RTX 6000 Ada Generation",)),
    GPU("RTX PRO 6000 Blackwell", (12, 0), 188, 96, _gib(94.97), f"{_GITHUB}antirez/ds4/issues/431", 1792, _YOTTA,
        (
            "RTX PRO 6000", "RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell Server Edition",
            "RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        )),
)  # fmt: skip

_DATA_CENTRE = (
    GPU("T4", (7, 5), 40, 16, _gib(14.56), f"{_GITHUB}Zheng-Chong/CatVTON/issues/133",
        320, f"{_ALLDBIN}Tesla-T4-and-L40-comparison.html"),
    GPU("V100 16GB", (7, 0), 80, 16, _gib(15.78), f"{_GITHUB}kchengiva/Shift-GCN/issues/34", 900, _V100,
        ("V100-SXM2-16GB", "V100-PCIE-16GB")),
    GPU("V100 32GB", (7, 0), 80, 32, 32494 * MIB, f"{_GITHUB}spiritbuun/buun-llama-cpp/pull/91", 900, _V100,
        ("V100-SXM2-32GB", "V100-SXM3-32GB", "V100-PCIE-32GB")),
    GPU("A10", (8, 6), 72, 24, _gib(21.99), f"{_GITHUB}zai-org/CogVLM/issues/236",
        600.2, "https://sysrqmts.com/ru/gpus/compare/nvidia-a10-pcie-vs-nvidia-quadro-rtx-4000", ("A10G",)),
    GPU("L4", (8, 9), 58, 24, 23034 * MIB, f"{_GITHUB}modal-labs/modal-client/pull/2797",
        300, "https://fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40", usable_is="nvidia-smi"),
    GPU("A40", (8, 6), 84, 48, _gib(44.4), f"{_GITHUB}ollama/ollama/issues/9858",
        695.8, f"{_ALLDBIN}A40-PCIe-and-L40G-comparison.html"),
    GPU("L40", (8, 9), 142, 48, _gib(44.40), f"{_GITHUB}QwenLM/Qwen3-VL/issues/2097",
        864, f"{_ALLDBIN}Tesla-T4-and-L40-comparison.html"),
    GPU("L40S", (8, 9), 142, 48, _gib(44.42), f"{_GITHUB}stepfun-ai/Step-Video-T2V/issues/8",
        864, "http://llmbook.apartsin.com/appendices/appendix-g-hardware-compute/section-g.1.html"),
    GPU("A100 40GB", (8, 0), 108, 40, 42_298_834_944, f"{_GITHUB}bottlerocket-os/bottlerocket/pull/3873", 1555, _A100,
        ("A100-SXM4-40GB", "A100-PCIE-40GB", "A100 PCIe 40GB", "A100 40GB PCIe", "A100 SXM 40GB")),
    GPU("A100 80GB", (8, 0), 108, 80, _gib(79.14), f"{_GITHUB}lianqi1008/Control-GIC/issues/6", 2039, _A100,
        ("A100-SXM4-80GB", "A100 80GB SXM", "A100 SXM 80GB")),
    GPU("H100 80GB", (9, 0), 132, 80, _gib(79.11), f"{_GITHUB}vllm-project/vllm/issues/27508", 3350, _H100,
        ("H100 80GB HBM3", "H100 SXM", "H100 SXM5", "H100 SXM 80GB", "H100 SXM5 80GB", "H100 80GB SXM")),
    GPU("H100 NVL", (9, 0), 132, 94, _gib(93.00), f"{_GITHUB}ali-vilab/VACE/issues/56", 3900, _H100,
        ("H100 NVL 94GB",)),
    GPU("H200", (9, 0), 132, 141, 150_109_880_320, _H200,
        4800, "https://www.nvidia.com/en-us/data-center/h200/", ("H200 SXM",)),
    # 7680 bits at 3996 MHz, twice a cycle, as the source's device reports; 8000 are advertised.
    GPU("B200", (10, 0), 148, 180, _gib(178.35), f"{_GITHUB}pytorch/ao/pull/4002",
        7672, f"{_GITHUB}pytorch/ao/pull/4002"),
)  # fmt: skip

GPUS = tuple(sorted(_CONSUMER + _WORKSTATION + _DATA_CENTRE, key=lambda gpu: (gpu.sold_gb, gpu.usable_bytes)))


def find_gpu(name: str) -> GPU:
    """Return the GPU of that name, however it is spelled: `rtx4090`, `NVIDIA A100-SXM4-80GB`.

    A name that says more or less than one GPU's (`RTX 4090 Laptop`, `A100`) is not resolved by guessing.

    Raises:
        ValueError: several have that name, or none has; one line with the candidates or the nearest.
    """
    from difflib import get_close_matches  # late: an estimate that names no GPU does without

    key, by_key = _key(name), _by_key()
    if key in by_key:
        return by_key[key]
    starting = {gpu.name for known, gpu in by_key.items() if key and known.startswith(key)}
    if len(starting) > 1:
        listed = ", ".join(gpu.name for gpu in GPUS if gpu.name in starting)
        raise ValueError(f"{name!r} is more than one GPU: name one of {listed}")
    close = get_close_matches(key, by_key, n=len(by_key), cutoff=0.5)
    close.sort(key=lambda known: not known.startswith(key[:4]))  # the series tells more than what follows it
    nearest = list(dict.fromkeys([*starting, *(by_key[known].name for known in close)]))[:3]
    hint = f"the nearest are {', '.join(nearest)}" if nearest else "give the size of its memory instead"
    raise ValueError(f"no GPU {name!r} is known: {hint}")


def _key(name: str) -> str:
    """Return what of a name tells GPUs apart."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    bare = re.sub(r"nvidia|geforce|tesla|quadro|rtx|tensorcore|gpu", "", bare)
    return re.sub(r"(?<=\d)gib$", "gb", bare)


def _keys(gpu: GPU) -> set[str]:
    keys = {_key(name) for name in (gpu.name, *gpu.aliases)}
    return keys | {f"{key}{gpu.sold_gb}gb" for key in keys if "gb" not in key}


@cache
def _by_key() -> dict[str, GPU]:
    return {key: gpu for gpu in GPUS for key in _keys(gpu)}


@dataclass(frozen=True)
class Overhead:
    """Device memory that is neither weights, KV cache nor activations.

    Attributes:
        nbytes: its size.
        status: `assumed`; `published` by others for a card of this family; `measured` on such a card, or on the
            one at hand.
        source: where the figure comes from.
    """

    nbytes: int
    status: str
    source: str


CUDA_CONTEXT = Overhead(
    512 * MIB,
    "assumed",
    "CUDA context 0.50 GiB (published: 256 MiB on RTX 3090, 426 MiB on RTX 6000 Ada, at most 0.61 GiB on H100)",
)
CUBLAS_WORKSPACE = Overhead(
    33_554_432,
    "assumed",
    "cuBLAS workspace 32 MiB (PyTorch's CublasHandlePool.cpp on sm_90; 8,519,680 B on older cards)",
)


@dataclass(frozen=True)
class Platform:
    """What a device and its libraries take, and how the runtime is set.

    Attributes:
        context: the CUDA context, outside the allocator.
        workspace: cuBLAS's workspace, a request to the allocator.
        attention: `flash` or `math`.
        expandable_segments: the allocator's setting.
        sm_count: streaming multiprocessors, which flash attention divides short chunks among.
    """

    context: Overhead
    workspace: Overhead
    attention: str = "flash"
    expandable_segments: bool = False
    sm_count: int = 132  # of an H100 or H200, as the assumed workspace is


ASSUMED_PLATFORM = Platform(CUDA_CONTEXT, CUBLAS_WORKSPACE)


_CONTEXTS = {
    (8, 0): Overhead(414 * MIB, "assumed", "CUDA context 414 MiB, told of A100 40GB without a page to cite"),
    (8, 6): Overhead(
        256 * MIB,
        "published",
        f"CUDA context 256 MiB (RTX 3090, PyTorch 2.7: {_GITHUB}invoke-ai/InvokeAI/issues/9413)",
    ),
    (8, 9): Overhead(
        426 * MIB,
        "published",
        f"CUDA context 426 MiB (RTX 6000 Ada, PyTorch 2.10: {_GITHUB}unslothai/unsloth-zoo/pull/1053)",
    ),
    (9, 0): Overhead(
        _gib(0.61),
        "published",
        "CUDA context at most 0.61 GiB (H100, 78.57 of 79.18 GiB free at start, vLLM: "
        f"{_GITHUB}llm-d/llm-d-benchmark/blob/259334868c5075da530cc6c90b43fceb11b6e6a7/"
        "config_explorer/empirical-vllm-memory-results.md)",
    ),
    (10, 0): Overhead(
        _gib(0.7), "assumed", "CUDA context about 0.7 GiB, told of B200 without a page to cite"
    ),
}  # before any kernel: those are loaded lazily, and add to it over a run
_MEASURED_CONTEXTS = {
    "H200": Overhead(
        710_934_528,
        "measured",
        "CUDA context and loaded kernels 678 MiB (518 MiB before the first kernel; PyTorch 2.11, driver 580.159.04: "
        f"{_H200})",
    ),
}  # after runs
_STANDS_IN = {(7, 0): (8, 0), (7, 5): (8, 6), (12, 0): (10, 0)}  # nothing is published for the former

_HANDLES = "aten/src/ATen/cuda/CublasHandlePool.cpp"
_LARGE_WORKSPACE, _SMALL_WORKSPACE = 4096 * 8 * 1024, 4096 * 2 * 1024 + 16 * 8 * 1024
_LARGE_SINCE = {9: (2, 0), 10: (2, 12), 11: (2, 14), 12: (2, 12)}  # by major capability, the first PyTorch
_UNCACHED_SINCE = (2, 15)
_PROJECTS_TORCH = (2, 13)


def platform_of(gpu: GPU | None, torch_version: str | None = None) -> Platform:
    """Return what a GPU and PyTorch take, as measured or published where anything is; `ASSUMED_PLATFORM` for None.

    Args:
        gpu: the card.
        torch_version: such as `2.13.0+cu130`; None for 2.13.

    Raises:
        ValueError: `torch_version` does not begin with two numbers.
    """
    if gpu is None:
        return ASSUMED_PLATFORM
    attention = "flash" if runs_flash(gpu) else "math"
    workspace = _workspace(gpu.capability, torch_version)
    return Platform(_context(gpu), workspace, attention, sm_count=gpu.sm_count)


def runs_flash(gpu: GPU) -> bool:
    """Whether a GPU runs flash attention: FlashAttention-2 needs Ampere."""
    return gpu.capability >= (8, 0)


def _context(gpu: GPU) -> Overhead:
    if gpu.name in _MEASURED_CONTEXTS:
        return _MEASURED_CONTEXTS[gpu.name]
    if gpu.capability in _CONTEXTS:
        return _CONTEXTS[gpu.capability]
    known = _CONTEXTS[_STANDS_IN[gpu.capability]]
    major, minor = gpu.capability
    return Overhead(known.nbytes, "assumed", f"none published for sm_{major}{minor}, so: {known.source}")


def _workspace(capability: tuple[int, int], torch_version: str | None) -> Overhead:
    """The default of `parseChosenWorkspaceSize`, for one handle and stream.

    It is requested once and kept; from PyTorch 2.15 on, each multiplication requests and frees it, which
    leaves the peak as it is wherever multiplications set it.
    """
    torch = _PROJECTS_TORCH if torch_version is None else _release(torch_version)
    first = _LARGE_SINCE.get(capability[0])
    size = _LARGE_WORKSPACE if first and torch >= first else _SMALL_WORKSPACE
    life = "each multiplication's own" if torch >= _UNCACHED_SINCE else "kept"
    where = f"sm_{capability[0]}{capability[1]} and PyTorch {torch[0]}.{torch[1]}"
    return Overhead(size, "published", f"cuBLAS workspace {size:,} B, {life} ({_HANDLES}, {where})")


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found:
        raise ValueError(f"{version!r} is no version of PyTorch: write it as 2.13 or 2.13.0+cu130")
    return int(found[1]), int(found[2])
