"""`quantkit generate`: text from a model, streamed."""

from __future__ import annotations

import json
import math

import click

from quantkit.cli import options, remarks


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


@click.command("generate")
@options.model_and("PROMPT")
@click.option(
    "--max-new-tokens", "-n", type=click.IntRange(1, options.MOST_TOKENS), default=128, show_default=True
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, callback=_finite, show_default=True,
    help="0 is greedy.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, callback=_finite, show_default=True
)
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Wrap PROMPT in the model's chat template.")
@click.option("--scheme", metavar="NAME", help="Quantize to this in memory first.")
@options.kv_bits
@options.dtype
@options.device
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object at the end instead of streaming.")
@remarks.quiet
@options.examples(
    'generate "The function returns"',
    'generate path/to/model "Why is the sky blue?" --chat --scheme nf4',
    'generate model.gguf "Once upon a time" -n 64 --temperature 0.8 --top-p 0.9 --seed 1',
)
def command(
    words: tuple[str, str],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    scheme: str | None,
    kv_bits: int | None,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Continue PROMPT with MODEL, a directory, a .gguf file or the embedded model, the default."""
    from quantkit.errors import QuantkitError
    from quantkit.estimate import Workload
    from quantkit.kernels.ops import choose_device
    from quantkit.models.generate import Sampling, generate
    from quantkit.models.loader import load
    from quantkit.room import in_memory
    from quantkit.schemes import get_scheme, plan_weights

    model, prompt = words
    wanted = get_scheme(scheme) if scheme else None
    place = choose_device(device)
    checkpoint = options.open_weights(model)
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not ids:
        raise QuantkitError(
            "the prompt is empty, and this tokenizer has no BOS to begin with: give a word at least"
        )
    if len(ids) + max_new_tokens > config.max_context:
        remarks.warn(
            f"{len(ids):,} + {max_new_tokens:,} tokens exceed the {config.max_context:,} of {config.name}"
        )
    plan = plan_weights(config, wanted) if wanted else None
    compute = wanted.dtype or dtype if wanted else dtype
    stop_ids = {*config.eos_token_ids, *tokenizer.eos_ids}
    stream = tokenizer.stream()
    sampling = Sampling(temperature, top_p, seed)
    pieces, new_tokens = [], 0
    run = Workload(len(ids) + max_new_tokens, kv_bits=kv_bits)
    with in_memory(config, compute or config.dtype, plan or checkpoint.schemes, run):
        with remarks.progress("loading", config.parameters) as bar:
            decoder = load(checkpoint, compute, plan, place, progress=bar.update)
        for token in generate(decoder, ids, max_new_tokens, sampling, stop_ids, kv_bits):
            new_tokens += 1
            pieces.append(stream.feed(token))
            if not as_json:
                click.echo(pieces[-1], nl=False)
    pieces.append(stream.finish())
    if not as_json:
        click.echo(pieces[-1])
        return
    body = {
        "model": config.name,
        "scheme": wanted.name if wanted else None,
        "kv_bits": kv_bits,
        "prompt_tokens": len(ids),
        "new_tokens": new_tokens,
        "stopped": "length" if new_tokens == max_new_tokens else "end",
        "text": "".join(pieces),
    }
    click.echo(json.dumps(body, indent=1))
