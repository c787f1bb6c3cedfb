"""`quantkit quantize`: a checkpoint at another precision, in a format that the ecosystem reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, page, remarks

if TYPE_CHECKING:
    from quantkit.quantize.convert import Conversion


@click.command("quantize")
@options.model_and("OUT")
@click.option(
    "--scheme", required=True, metavar="NAME", help="int8, int4-g128, nf4, bf16, ... as in estimate."
)
@options.file_policy
@click.option("--force", is_flag=True, help="Replace OUT where it is a model directory or empty.")
@click.option("--json", "as_json", is_flag=True, help="Print errors and sizes as JSON.")
@remarks.quiet
@options.examples(
    "quantize tiny-nf4 --scheme nf4",
    "quantize path/to/model out/int4 --scheme int4-g128",
    "quantize model.gguf out/int8 --scheme int8 --include lm_head",
)
def command(
    words: tuple[str, str],
    scheme: str,
    include: Sequence[str],
    exclude: Sequence[str],
    indivisible: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL at another precision to the directory OUT.

    MODEL is a directory, a .gguf file, or tiny-mistral, the embedded model, which is the default.

    The linears of the blocks are quantized; embedding, head and norms stay as they are. int4 and int8 are
    written as compressed-tensors, nf4 as bitsandbytes. OUT appears whole or not at all.
    """
    from quantkit.schemes import get_scheme

    model, out = words[0], Path(words[1])
    wanted = get_scheme(scheme)
    checkpoint = options.open_weights(model)
    from quantkit.quantize.convert import convert

    policy = options.as_indivisible(indivisible)
    with remarks.progress(f"writing {wanted.name}", checkpoint.config.parameters) as bar:
        conversion = convert(checkpoint, out, wanted, include, exclude, policy, force, bar.update)
    if as_json:
        click.echo(json.dumps(_body(conversion), indent=1))
    else:
        page.show(_text(conversion))


def _body(conversion: Conversion) -> dict[str, Any]:
    """Return what `--json` prints; the ratio of a matrix that lost nothing is null."""
    return {
        "out": str(conversion.out),
        "scheme": conversion.scheme,
        "bytes_before": conversion.bytes_before,
        "bytes_after": conversion.bytes_after,
        "matrices": [
            {
                "name": row.name,
                "scheme": row.scheme,
                "sqnr_db": row.sqnr_db if math.isfinite(row.sqnr_db) else None,
                "bytes_before": row.bytes_before,
                "bytes_after": row.bytes_after,
            }
            for row in conversion.worst_first
        ],
    }


def _text(conversion: Conversion) -> str:
    from calculators.units import format_bytes

    rows = [
        [
            row.name.removesuffix(".weight"),
            row.scheme,
            f"{row.sqnr_db:.2f}",
            format_bytes(row.bytes_before),
            format_bytes(row.bytes_after),
        ]
        for row in conversion.worst_first
    ]
    table = page.table(["matrix, worst first", "scheme", "SQNR dB", "before", "after"], rows)
    before, after = conversion.bytes_before, conversion.bytes_after
    sizes = f"{format_bytes(before)} before, {format_bytes(after)} after ({after / before:.1%})"
    return (f"{table}\n\n" if rows else "") + f"all weights: {sizes}\n{conversion.out}"
