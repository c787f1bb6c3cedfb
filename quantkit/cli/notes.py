"""What the reader of an estimate should know beside its figures: one line each."""

from __future__ import annotations

from collections.abc import Sequence

from calculators.units import format_gib, format_tokens
from quantkit.cli import options, remarks
from quantkit.cli.machine import AS_STORED, Machine
from quantkit.config import ModelConfig
from quantkit.estimate import Estimator


def size(given: options.Size | None) -> list[str]:
    """Say what a size in GB comes to."""
    if given is None or not given.decimal or given.text.strip()[-2] not in "gG":
        return []
    number = given.text.strip()[:-2].strip()
    return [
        f"{number} GB is {given.nbytes:,} bytes, {format_gib(given.nbytes)} GiB; a card sold as "
        f"{number} GB has about {number} GiB: write {number}GiB for it"
    ]


def stored(subject: options.Subject, where: Machine) -> list[str]:
    """Say what the row of a GGUF's own weights is, or why there is none."""
    if not subject.is_gguf:
        return []
    if where.gpus > 1:
        return [f"no row {AS_STORED}: how a GGUF's blocks would be split over GPUs is not known"]
    return [
        f"{AS_STORED}: the weights as the file holds them; quantkit itself runs a GGUF dequantized, "
        f"as its {subject.config.dtype} row says"
    ]


def short_groups(rows: Sequence[Estimator]) -> list[str]:
    """Say which schemes have short last groups: they can be computed with, but not written."""
    found = {}
    for row in rows:
        ragged = [
            spec.shape[1]
            for spec in row.config.tensors
            if spec.name in row.plan and not row.plan[spec.name].divides(spec.shape[1])
        ]
        if ragged and row.scheme.name != AS_STORED:
            found[row.scheme.name] = f"K = {', '.join(map(str, sorted(set(ragged))))}"
    return [
        f"{name}: short last groups ({which}), which no file can hold; --indivisible int8|keep shows what "
        "can be written"
        for name, which in found.items()
    ]


def share(config: ModelConfig, gpus: int) -> list[str]:
    """Say what the figures of a share under tensor parallelism are, and what they leave out."""
    if gpus == 1:
        return []
    return [
        f"tensor parallel: each of {gpus} GPUs holds {config.n_heads} query and {config.n_kv_heads} KV heads, "
        f"{config.intermediate_size:,} FFN columns and {config.vocab_size:,} rows of the vocabulary, and all "
        "norms; NCCL's buffers and the gathered logits are not included, and quantkit itself runs on one GPU"
    ]


def warn_of_long_contexts(config: ModelConfig, contexts: Sequence[int]) -> None:
    """Warn on stderr of contexts that the model is not made for."""
    above = [format_tokens(context) for context in contexts if context > config.max_context]
    if above:
        remarks.warn(
            f"{', '.join(above)}: above the {format_tokens(config.max_context)} tokens that {config.name} "
            "is made for"
        )
