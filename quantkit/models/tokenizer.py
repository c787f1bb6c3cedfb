"""Text to ids and back, chat templates, and pieces of text while they are generated.

One class over two libraries: tokenizers (tokenizer.json, and what a GGUF describes) and
sentencepiece (tokenizer.model).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.config import read_json
from quantkit.errors import ConfigError, TokenizerError
from quantkit.models.chat_template import MISTRAL_TEMPLATE, Message, render

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

    from quantkit.formats.gguf_header import GGUFHeader

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_REPLACEMENT = "\ufffd"  # how an unfinished UTF-8 sequence decodes


class _Backend(Protocol):
    """What the two libraries have in common; special tokens in a text are matched whole."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def save(self, directory: Path) -> None: ...


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: the library at work.
        named: the texts of bos_token, eos_token and so on, where the model has them.
        adds_bos: whether `encode` puts BOS in front when not told.
        chat_template: Jinja source.
        more_eos_ids: ids beside eos_token that end a generation.

    Attributes:
        bos_id: None where the model has no BOS.
        eos_ids: every id that ends a generation.
        vocab_size: ids, added tokens included.
    """

    def __init__(
        self,
        backend: _Backend,
        named: Mapping[str, str],
        adds_bos: bool,
        chat_template: str | None,
        more_eos_ids: Sequence[int] = (),
    ) -> None:
        self._backend, self._named, self._adds_bos = backend, dict(named), adds_bos
        self.chat_template = chat_template
        self.vocab_size = backend.vocab_size
        self.bos_id = backend.token_id(named.get("bos_token", ""))
        eos = backend.token_id(named.get("eos_token", ""))
        self.eos_ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *more_eos_ids]))

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Return the tokenizer of a model directory: tokenizer.json, else SentencePiece's tokenizer.model.

        Raises:
            TokenizerError: there is neither, or a file is broken.
        """
        config = _optional_json(path / "tokenizer_config.json")
        texts = _optional_json(path / "special_tokens_map.json") | config
        named = {name: text for name in _NAMED if (text := _content(texts.get(name))) is not None}
        template = _chat_template(path, config)
        backend: _Backend
        if (path / "tokenizer.json").exists():
            backend = _HuggingFace(_load_tokenizer_json(path / "tokenizer.json"))
            adds_bos = backend.adds_bos(named.get("bos_token"))
        elif (path / "tokenizer.model").exists():
            backend = _SentencePiece(path / "tokenizer.model", _added_tokens(path, config))
            named = backend.named() | named
            adds_bos = True  # Llama and Mistral; nothing in the file says so
            if template is None and _is_mistral(path) and backend.token_id("[INST]") is None:
                template = MISTRAL_TEMPLATE
        else:
            raise TokenizerError(f"{path} has no tokenizer: put tokenizer.json or tokenizer.model there")
        if isinstance(config.get("add_bos_token"), bool):
            adds_bos = config["add_bos_token"]
        eos = _optional_json(path / "generation_config.json").get("eos_token_id")
        more_eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(backend, named, adds_bos, template, more_eos)

    @classmethod
    def from_gguf(cls, header: GGUFHeader) -> Tokenizer:
        """Return the tokenizer that a GGUF's metadata describes.

        Raises:
            TokenizerError: there is none, or it is of an unknown kind.
        """
        from quantkit.models import gguf_tokenizer

        backend = _HuggingFace(gguf_tokenizer.build(header))
        return cls(
            backend,
            gguf_tokenizer.named_tokens(header),
            gguf_tokenizer.adds_bos(header),
            header.text("tokenizer.chat_template"),
            header.end_token_ids,
        )

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Return the ids of a text; special tokens spelled out in it become their ids.

        An EOS is never appended: text here is continued or scored.

        Args:
            text: any Unicode string.
            add_bos: whether BOS comes first; None means as the tokenizer does by default.

        Raises:
            TokenizerError: BOS is asked for, but the model has none; or the text holds half a surrogate pair, as
                Python makes of bytes that are no UTF-8.
        """
        if add_bos and self.bos_id is None:
            raise TokenizerError("this tokenizer has no BOS token to put in front")
        wanted = self._adds_bos if add_bos is None else add_bos
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid UTF-8 at character {error.start:,}") from None
        ids = self._backend.encode(text)
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids)

    def stream(self) -> TokenStream:
        """Return a decoder for ids that arrive one at a time."""
        return TokenStream(self.decode)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt that the model's template makes of a conversation.

        Raises:
            TokenizerError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template: pass the prompt as plain text")
        return render(self.chat_template, messages, add_generation_prompt, self._named)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation; a BOS that the template writes is not doubled."""
        text = self.apply_chat_template(messages, add_generation_prompt)
        bos = self._named.get("bos_token")
        return self.encode(text, add_bos=False if bos and text.startswith(bos) else None)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json (of SentencePiece its own tokenizer.model) and tokenizer_config.json.

        transformers loads the directory without further files.
        """
        self._backend.save(directory)
        config: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer"
            if isinstance(self._backend, _SentencePiece)
            else "PreTrainedTokenizerFast",
            **self._named,
            "add_bos_token": self._adds_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class TokenStream:
    """Turns ids that arrive one at a time into text; the pieces add up to what `decode` gives."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # ids last printed: a token's leading space shows only behind another
        self._printed = ""  # their text
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that this id completes; empty while a UTF-8 character is unfinished."""
        self._pending.append(token)
        text = self._text()
        return "" if text.endswith(_REPLACEMENT) else self._take(text)

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        return self._take(self._text())

    def _text(self) -> str:
        return self._decode(self._context + self._pending)

    def _take(self, text: str) -> str:
        alone = self._decode(self._pending)
        # A stray byte turns the bytes before it into U+FFFD too; what is printed stays printed.
        piece = text[len(self._printed) :] if text.startswith(self._printed) else alone
        if alone:
            self._context, self._printed = self._pending, alone
        else:
            self._context, self._printed = self._context + self._pending, text
        self._pending = []
        return piece


class _HuggingFace:
    """The tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # files made for batches may cut texts short
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def adds_bos(self, bos: str | None) -> bool:
        return bos is not None and self._tokenizer.encode("").tokens[:1] == [bos]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def save(self, directory: Path) -> None:
        self._tokenizer.save(str(directory / "tokenizer.json"))


class _SentencePiece:
    """The sentencepiece library, which neither matches special tokens in a text nor knows added ones."""

    def __init__(self, path: Path, added: Mapping[str, int]) -> None:
        self._processor = _load_sentencepiece(path)
        size = self._processor.get_piece_size()
        special = {
            self._processor.id_to_piece(index): index
            for index in range(size)
            if self._processor.is_control(index) or self._processor.is_unknown(index)
        }
        self._added = {token: index for token, index in added.items() if index >= size}
        self._special = special | self._added
        self._special_ids = frozenset(self._special.values())
        self.vocab_size = max([size - 1, *self._special_ids]) + 1
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def named(self) -> dict[str, str]:
        """Return the special tokens that the model itself names."""
        processor = self._processor
        ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
        }
        return {name: processor.id_to_piece(index) for name, index in ids.items() if index >= 0}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([index for index in ids if index not in self._special_ids])
        return text

    def token_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        found: int = self._processor.piece_to_id(token)
        return None if self._processor.is_unknown(found) else found

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(self._processor.serialized_model_proto())
        if self._added:
            (directory / "added_tokens.json").write_text(json.dumps(self._added), encoding="utf-8")


def _load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain exceptions, and panics that are none
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from None


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path} cannot be read as a SentencePiece model: {error}") from None


def _optional_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _content(value: Any) -> str | None:
    """Return a special token's text, which older files wrap in an object."""
    return value.get("content") if isinstance(value, dict) else value


def _added_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens that were added to a SentencePiece vocabulary; they count as special."""
    added = dict(_optional_json(path / "added_tokens.json"))
    for index, token in config.get("added_tokens_decoder", {}).items():
        added[str(_content(token))] = int(index)
    return added


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _is_mistral(path: Path) -> bool:
    return _optional_json(path / "config.json").get("model_type") == "mistral"
