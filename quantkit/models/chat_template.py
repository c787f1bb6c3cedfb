"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from quantkit.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}

# What Mistral-7B-Instruct v0.1 and v0.2 were trained with, where [INST] is plain text
# (https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2).
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
)


def render(
    template: str, messages: Sequence[Message], add_generation_prompt: bool, tokens: Mapping[str, str]
) -> str:
    """Return the prompt a template makes of a conversation.

    Args:
        template: Jinja source.
        messages: role and content each.
        add_generation_prompt: whether the assistant's turn is opened.
        tokens: `bos_token`, `eos_token` and so on, as the template names them.

    Raises:
        TokenizerError: the template is broken, or refuses the messages.
    """
    import jinja2

    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **tokens,
            )
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise TokenizerError(f"the chat template fails: {error}") from None


def _environment() -> jinja2.Environment:
    """Return a sandbox with what transformers offers to templates."""
    from jinja2 import TemplateError, ext, nodes, parser, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it is their text alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
