"""`quantkit inspect`: what a model is, in the figures that model pages leave out."""

from __future__ import annotations

import json
from typing import Any

import click

from calculators.units import format_tokens
from quantkit.cli import options, page, remarks
from quantkit.config import ModelConfig
from quantkit.presets import DEFAULT_PRESET, PRESETS

_ROLES = (
    ("attention", ("attention",)),
    ("FFN", ("ffn",)),
    ("embedding and head", ("embedding", "head")),
    ("norms", ("norm",)),
)


@click.command("inspect", epilog=f"Presets: {', '.join(PRESETS)}.")
@click.argument("model", default=DEFAULT_PRESET)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@remarks.quiet
@options.examples(
    "inspect",
    "inspect qwen2.5-7b",
    "inspect path/to/model --json",
)
def command(model: str, as_json: bool) -> None:
    """Show MODEL's parameters by role, its shapes, norm, RoPE, window and context.

    MODEL is a preset, a directory with config.json, or a .gguf file [default: mistral-7b-instruct-v0.2].
    """
    subject = options.find_model(model)
    if as_json:
        click.echo(json.dumps(_body(subject), indent=1))
    else:
        page.show(_text(subject))


def _body(subject: options.Subject) -> dict[str, Any]:
    """Return what `--json` prints; counts are integers, absent things null."""
    config = subject.config
    scaling = config.rope_scaling
    body = {
        "model": config.name,
        "architecture": config.architecture,
        "parameters": config.parameters,
        "parameters_by_role": config.parameters_by_role(),
        "tensors": len(config.tensors),
        "dtype": config.dtype,
        "layers": config.n_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "activation": config.activation,
        "norm": "rmsnorm",
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(vars(scaling)),
        "rope_divisors": config.rope_divisors,
        "sliding_window": config.sliding_window,
        "max_context": config.max_context,
        "tied_embeddings": config.tie_embeddings,
    }
    if subject.checkpoint:
        body["stored_bytes"] = subject.checkpoint.stored_bytes
        body["stored_schemes"] = _stored_schemes(subject)
    return body


def _text(subject: options.Subject) -> str:
    config = subject.config
    counts = config.parameters_by_role()
    rows = [[label, f"{sum(counts[role] for role in roles):,}"] for label, roles in _ROLES]
    rows.append(["total", f"{config.parameters:,}"])
    facts = page.Facts(
        [
            ("architecture", f"{config.architecture}, {config.n_layers} layers"),
            ("tensors", f"{len(config.tensors)}"),
            ("dtype", config.dtype),
            ("hidden, FFN", f"{config.hidden_size:,}, {config.intermediate_size:,}"),
            ("attention", _attention(config)),
            (
                "vocabulary",
                f"{config.vocab_size:,}, {'tied' if config.tie_embeddings else 'untied'} head",
            ),
            ("activation", f"{config.activation}, gated (SwiGLU)"),
            ("norm", f"RMSNorm, eps {config.norm_eps:g}"),
            ("RoPE", _rope(config)),
            ("window", f"{config.sliding_window:,} tokens" if config.sliding_window else "none"),
            ("context", f"{config.max_context:,} tokens"),
        ]
    )
    if subject.checkpoint:
        facts.lines.append(("stored", _stored(subject)))
    return f"{config.name}\n\n{page.table(['parameters', ''], rows)}\n\n{facts.text('')}"


def _attention(config: ModelConfig) -> str:
    biases = ", bias on Q, K and V" if config.qkv_bias else ""
    return f"{config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} for keys and values{biases}"


def _rope(config: ModelConfig) -> str:
    text = f"theta {config.rope_theta:,.0f}"
    scaling = config.rope_scaling
    if scaling is not None:
        original = format_tokens(scaling.original_max_position_embeddings)
        text += f", Llama-3 scaling by {scaling.factor:g} from {original}"
    if config.rope_divisors is not None:
        text += f", frequencies divided by up to {max(config.rope_divisors):g}"
    return text


def _stored(subject: options.Subject) -> str:
    assert subject.checkpoint is not None
    kinds = ", ".join(f"{count} matrices {name}" for name, count in _stored_schemes(subject).items())
    return f"{subject.checkpoint.stored_bytes:,} bytes" + (f": {kinds}" if kinds else "")


def _stored_schemes(subject: options.Subject) -> dict[str, int]:
    counts: dict[str, int] = {}
    for scheme in subject.schemes.values():
        counts[scheme.name] = counts.get(scheme.name, 0) + 1
    return counts
