"""A benchmark on a CPU or a GPU as titled tables: the command and reports print the same ones."""

from __future__ import annotations

from quantkit.bench import tables
from quantkit.bench.cuda import tables as cuda_tables
from quantkit.bench.cuda.results import AnyBench, CudaBench
from quantkit.bench.tables import Table

Section = tuple[str, Table]


def facts(found: AnyBench) -> list[tuple[str, str]]:
    """Return what the machine is and can do, as labelled facts."""
    return cuda_tables.machine(found) if isinstance(found, CudaBench) else tables.machine(found)


def warnings(found: AnyBench) -> list[str]:
    """Return lines that a reader must know before the figures."""
    unfinished = isinstance(found, CudaBench) and not found.finished
    return [tables.QUICK] * found.quick + [cuda_tables.UNFINISHED] * unfinished


def kernels(found: AnyBench) -> list[Section]:
    """Return the tables of the kernels, none where they were not run."""
    if not found.cells:
        return []
    return [
        (f"Share of the {found.words.bandwidth} at one row", tables.shares(found)),
        (tables.about_kernels(found), tables.kernels(found)),
    ]


def models(found: AnyBench) -> list[Section]:
    """Return the tables of whole models, and of all else."""
    if not isinstance(found, CudaBench):
        return [(tables.about_models(found), tables.models(found))] if found.models else []
    sections = []
    if found.decodes:
        sections.append((cuda_tables.about_decodes(found), cuda_tables.decodes(found)))
    if found.prefills:
        sections.append((cuda_tables.ABOUT_PREFILLS, cuda_tables.prefills(found)))
    if found.repeats:
        sections.append((cuda_tables.ABOUT_REPEATS, cuda_tables.repeats(found)))
    if found.failures:
        sections.append((cuda_tables.ABOUT_FAILURES, cuda_tables.failures(found)))
    return sections
