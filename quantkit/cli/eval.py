"""`quantkit eval`: perplexity of a model and of what quantization makes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import bars, options, page, remarks
from quantkit.cli.output import check, finish
from quantkit.embedded import EMBEDDED_MODEL

if TYPE_CHECKING:
    from quantkit.evaluate.run import Evaluation


@click.command("eval")
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--scheme", "schemes", multiple=True, metavar="NAME", help="Also quantize to this; repeatable.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 file; default: Python's language reference."
)
@click.option("--dataset", type=click.Choice(["wikitext2"]), help="Fetch this text from the Hub.")
@click.option(
    "--window", type=click.IntRange(2), help="Tokens a window holds [default: 2048, or the context]."
)
@click.option("--stride", type=click.IntRange(1), help="Tokens between windows [default: the window].")
@click.option("--limit-tokens", type=click.IntRange(2), help="Use only this many tokens of the text.")
@click.option(
    "--kv-bits",
    type=click.Choice(["16", "8", "4"]),
    multiple=True,
    help="Bits of the KV cache; repeatable [default: the dtype's].",
)
@click.option(
    "--kv-group", type=click.IntRange(0), default=0, help="Elements that share a KV scale [default: a head]."
)
@options.dtype
@options.device
@options.policy
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Record [default: perplexity-MODEL.json].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record's body as JSON.")
@remarks.quiet
@options.examples(
    "eval --scheme int8 --scheme nf4",
    "eval path/to/model --dataset wikitext2 --scheme int4-g128",
    "eval model.gguf --kv-bits 16 --kv-bits 8 --kv-bits 4",
)
def command(
    model: str,
    schemes: Sequence[str],
    text: Path | None,
    dataset: str | None,
    window: int | None,
    stride: int | None,
    limit_tokens: int | None,
    kv_bits: Sequence[str],
    kv_group: int,
    dtype: str | None,
    device: str,
    include: Sequence[str],
    exclude: Sequence[str],
    indivisible: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, and of each --scheme made from it.

    MODEL is a directory, a .gguf file, or tiny-mistral, the embedded model, which is the default.

    Schemes are quantized in memory; nothing is written but a record of the result.
    """
    if text and dataset:
        raise click.UsageError("--text and --dataset exclude each other: name one text")
    caches = [int(bits) for bits in kv_bits]
    options.refuse_idle_group(kv_group, caches)
    from quantkit.errors import OutputError, QuantkitError
    from quantkit.evaluate import run, texts
    from quantkit.kernels.ops import choose_device
    from quantkit.schemes import get_scheme

    wanted = list(dict.fromkeys(get_scheme(name) for name in schemes))
    checkpoint = options.open_weights(model)
    path = output or Path(f"perplexity-{checkpoint.config.name}.json")
    if _is_input(path, checkpoint.path, text):
        raise OutputError(f"{path} is what is evaluated; choose another file for the record")
    check(path)
    source = (
        texts.text_file(text) if text else texts.hub_dataset(dataset) if dataset else texts.python_reference()
    )
    evaluation = run.Evaluation(
        checkpoint,
        source,
        window,
        stride,
        limit_tokens,
        caches or (None,),
        kv_group,
        dtype,
        choose_device(device),
    )
    plain = not checkpoint.schemes
    for scheme in [one for one in wanted if plain and one.dtype == evaluation.dtype]:
        remarks.remark(f"{scheme.name}: what the original is computed in, so it is not evaluated twice")
        wanted.remove(scheme)
    if evaluation.windows.window > checkpoint.config.max_context:
        remarks.warn(
            f"windows of {evaluation.windows.window:,} tokens exceed the {checkpoint.config.max_context:,} of "
            f"{checkpoint.config.name}"
        )
    failures: list[str] = []
    with remarks.progress(
        "evaluating", evaluation.n_windows * (1 + len(wanted)) * len(evaluation.kv_bits)
    ) as bar:
        policy = options.as_indivisible(indivisible)
        results = evaluation.run(wanted, include, exclude, policy, bar.update, failures.append)
    body = evaluation.body(results)
    finish(path, "perplexity", body, as_json, lambda: _text(evaluation, body))
    if failures:
        raise QuantkitError("; ".join(failures))


def _is_input(path: Path, model: Path, text: Path | None) -> bool:
    """Whether a record at `path` would replace the text, or a file of the model that is no record itself."""
    place, source = os.path.realpath(path), os.path.realpath(model)
    if place == source or (text and place == os.path.realpath(text)):
        return True
    if os.path.dirname(place) != source or not path.is_file():
        return False
    from quantkit.records import is_record

    return path.suffix != ".json" or not is_record(path)


def _text(evaluation: Evaluation, body: dict[str, Any]) -> str:
    protocol = body["protocol"]

    def known(error: float | None) -> str:  # one window leaves it open
        return "" if error is None else f" ± {error:.4f}"

    rows = [
        [
            result["scheme"],
            str(result["kv_bits"]),
            f"{result['perplexity']:.4f}" + known(result["standard_error"]),
            f"{result['difference']:+.4f}" + known(result["difference_standard_error"]) if index else "",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['weights_bytes']:,}",
        ]
        for index, result in enumerate(body["results"])
    ]
    header = ["scheme", "KV bits", "perplexity", "difference", "tokens/s", "weight bytes"]
    short = ["scheme", "KV", "perplexity", "difference", "tok/s", "bytes"]
    about = (
        f"{body['model']} on {protocol['text']}: {protocol['tokens_scored']:,} tokens scored in "
        f"{protocol['windows']:,} windows of {protocol['window']:,}, computed in {body['dtype']} on {body['device']}"
    )
    differences = [result["difference"] for result in body["results"]]
    beside = bars.lengths("", differences, "bars: the difference to the original's perplexity")
    return about + "\n\n" + page.table(header, rows, short=short, beside=beside)
