"""Cards and their names, what a device and its libraries take, and verdicts."""

from __future__ import annotations

import pytest

from calculators.fit import smallest_card, verdict
from calculators.hardware import ASSUMED_PLATFORM, GPU, GPUS, find_gpu, platform_of
from calculators.units import GIB, MIB
from tests.paths import ROOT

FAMILIES = {"volta": 7, "turing": 7, "ampere": 8, "ada": 8, "hopper": 9}
SMALL, LARGE = 8_519_680, 33_554_432


def test_a_card_has_less_than_it_is_sold_with_and_says_who_saw_it() -> None:
    for gpu in GPUS:
        assert 0.9 * gpu.sold_gb * GIB < gpu.usable_bytes < gpu.sold_gb * GIB, gpu.name
        assert gpu.usable_is in ("cuda", "nvidia-smi")
        assert gpu.usable_source.startswith("https://") or (ROOT / gpu.usable_source).is_file()
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert list(GPUS) == sorted(GPUS, key=lambda gpu: gpu.sold_gb)


@pytest.mark.parametrize(
    ("name", "cores"),
    [("T4", 2560), ("A100 80GB", 6912), ("RTX 4090", 16384), ("H100 80GB", 16896), ("L4", 7424)],
)
def test_a_multiprocessor_has_so_many_cores_as_its_architecture_gives_it(name: str, cores: int) -> None:
    gpu = find_gpu(name)
    assert gpu.sm_count * (64 if gpu.capability in ((7, 0), (7, 5), (8, 0)) else 128) == cores
    assert platform_of(gpu).sm_count == gpu.sm_count


def test_a_card_has_a_bandwidth_that_somebody_published() -> None:
    for gpu in GPUS:
        assert 200 < gpu.bandwidth_gb_s <= 8000, gpu.name
        assert gpu.bandwidth_source.startswith(("https://", "http://"))


def test_the_family_follows_from_the_capability() -> None:
    for gpu in GPUS:
        major = gpu.capability[0]
        assert FAMILIES.get(gpu.family, major) == major, gpu.name
        assert (gpu.family == "blackwell") == (major >= 10), gpu.name
    assert find_gpu("L40S").family == "ada"
    assert find_gpu("A40").family == "ampere"


def test_every_name_and_alias_finds_its_card() -> None:
    for gpu in GPUS:
        for name in (gpu.name, *gpu.aliases):
            assert find_gpu(name) == gpu
            assert find_gpu(f"NVIDIA {name}".upper().replace(" ", "-")) == gpu


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX 4090 (24 GB)", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("nvidia h100 80gb hbm3", "H100 80GB"),
        ("A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA A10G", "A10"),
        ("l4", "L4"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
    ],
)
def test_a_card_is_found_as_drivers_and_people_write_it(written: str, name: str) -> None:
    assert find_gpu(written).name == name


@pytest.mark.parametrize(
    ("written", "candidates"),
    [
        ("A100", "A100 40GB, A100 80GB"),
        ("v100", "V100 16GB, V100 32GB"),
        ("NVIDIA H100", "H100 80GB, H100 NVL"),
    ],
)
def test_a_name_of_several_cards_is_refused_with_all_of_them(written: str, candidates: str) -> None:
    with pytest.raises(ValueError, match=f"more than one GPU: name one of {candidates}$"):
        find_gpu(written)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("RTX 409O", "RTX 4090"),
        ("RTX 4090 Laptop GPU", "RTX 4090"),  # another card, of 16 GB
        ("RTX 5060 Ti", "RTX 5060 Ti 16GB"),  # there is one of 8 GB
        ("RTX 3060 8GB", "RTX 3060 12GB"),
        ("H100 PCIe", "H100 80GB"),
        ("Quadro RTX 6000", "RTX 6000 Ada"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(written: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="known: the nearest are ") as caught:
        find_gpu(written)
    message = str(caught.value)
    assert nearest in message
    assert "\n" not in message


@pytest.mark.parametrize("written", ["abacus", "", "RTX"])
def test_a_name_like_none_asks_for_the_memory(written: str) -> None:
    with pytest.raises(ValueError, match=r"give the size of its memory instead$"):
        find_gpu(written)


def test_what_is_assumed_says_where_it_comes_from() -> None:
    context, workspace = ASSUMED_PLATFORM.context, ASSUMED_PLATFORM.workspace
    assert (context.nbytes, workspace.nbytes) == (536_870_912, LARGE)
    assert context.status == workspace.status == "assumed"
    assert "H100" in context.source
    assert "cuBLAS" in workspace.source


def test_no_card_gives_what_is_assumed() -> None:
    assert platform_of(None) == ASSUMED_PLATFORM
    assert platform_of(None, "2.6.0") == ASSUMED_PLATFORM


@pytest.mark.parametrize(
    ("name", "context", "status"),
    [
        ("RTX 3090", 256 * MIB, "published"),
        ("RTX 4090", 426 * MIB, "published"),
        ("H100 80GB", round(0.61 * GIB), "published"),
        ("H200", 710_934_528, "measured"),
        ("A100 80GB", 414 * MIB, "assumed"),
        ("B200", round(0.7 * GIB), "assumed"),
    ],
)
def test_a_context_is_the_cards_or_its_capabilitys(name: str, context: int, status: str) -> None:
    found = platform_of(find_gpu(name)).context
    assert (found.nbytes, found.status) == (context, status)


def test_only_a_figure_with_a_page_to_cite_is_called_published() -> None:
    for gpu in GPUS:
        context = platform_of(gpu).context
        if context.status == "published":
            assert "https://" in context.source


@pytest.mark.parametrize(
    ("name", "stand_in", "sm"),
    [("T4", "RTX 3090", "75"), ("V100 16GB", "A100 40GB", "70"), ("RTX 5090", "B200", "120")],
)
def test_another_cards_context_that_stands_in_is_named(name: str, stand_in: str, sm: str) -> None:
    context = platform_of(find_gpu(name)).context
    assert context.status == "assumed"
    assert context.nbytes == platform_of(find_gpu(stand_in)).context.nbytes
    assert stand_in in context.source
    assert f"none published for sm_{sm}" in context.source


@pytest.mark.parametrize(
    ("name", "version", "size"),
    [
        ("T4", "2.13.0", SMALL),
        ("A100 80GB", "2.13.0", SMALL),
        ("RTX 4090", None, SMALL),
        ("H100 80GB", "1.13.1", SMALL),
        ("H100 80GB", "2.0.1", LARGE),
        ("H200", None, LARGE),
        ("RTX 5090", "2.11.0+cu130", SMALL),
        ("RTX 5090", "2.12.0+cu130", LARGE),
        ("B200", "2.11.1", SMALL),
        ("B200", "2.13.0a0+git1234567", LARGE),
    ],
)
def test_the_workspace_follows_capability_and_version(name: str, version: str | None, size: int) -> None:
    workspace = platform_of(find_gpu(name), version).workspace
    assert (workspace.nbytes, workspace.status) == (size, "published")
    assert "CublasHandlePool.cpp" in workspace.source


def test_the_source_says_whether_the_workspace_is_kept() -> None:
    gpu = find_gpu("H200")
    assert "kept" in platform_of(gpu, "2.14.0").workspace.source
    assert "kept" not in platform_of(gpu, "2.15.0").workspace.source


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'main' is no version of PyTorch"):
        platform_of(find_gpu("H200"), "main")


def test_flash_attention_needs_ampere() -> None:
    for gpu in GPUS:
        assert platform_of(gpu).attention == ("math" if gpu.family in ("volta", "turing") else "flash")


def test_the_smallest_card_holds_the_need_and_none_smaller_does() -> None:
    for gpu in GPUS:
        found = card_for(gpu.usable_bytes)
        assert found is not None
        assert found.usable_bytes == gpu.usable_bytes
        beyond = card_for(gpu.usable_bytes + 1)
        assert beyond is None or beyond.usable_bytes > gpu.usable_bytes
    assert card_for(max(gpu.usable_bytes for gpu in GPUS) + 1) is None


def card_for(needed: int, reserve: int = 0) -> GPU | None:
    found = smallest_card(lambda gpu: needed, reserve)
    return found and found[0]


def test_a_reserve_is_kept_free() -> None:
    assert verdict(10 * GIB, 12 * GIB).fits
    assert verdict(12 * GIB, 12 * GIB).fits
    assert verdict(10 * GIB, 12 * GIB, reserve=2 * GIB).margin_bytes == 0
    assert not verdict(10 * GIB, 12 * GIB, reserve=2 * GIB + 1).fits
    need = find_gpu("RTX 4060").usable_bytes
    assert card_for(need) == find_gpu("RTX 4060")
    assert card_for(need, reserve=GIB) == find_gpu("RTX 3080")
