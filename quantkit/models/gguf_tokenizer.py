"""The tokenizer that a GGUF's metadata describes, built with the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from quantkit.formats.gguf_header import GGUFHeader

# llama.cpp's token types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # what SentencePiece writes for a space

# How text is cut before byte-level BPE, as the models' own tokenizer.json say. GPT-2's pattern is
# the library's default; the others differ in how many digits hold together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.format(digits=r"\p{N}{1,3}"), _WORDS.format(digits=r"\p{N}")
_PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")


def build(header: GGUFHeader) -> tokenizers.Tokenizer:
    """Return the tokenizer; `<bos>` is added in front where the file, or llama.cpp's default, says so.

    Raises:
        TokenizerError: there is none, it is of an unknown kind, or its parts contradict each other.
    """
    kind = header.text("tokenizer.ggml.model")
    tokens = _strings(header, "tokens")
    types = header.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise TokenizerError(
            f"{header.path}: its tokenizer has {len(tokens):,} tokens, {len(vocab):,} of them distinct, "
            f"and {len(types):,} types; these must be equal"
        )
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(header, vocab)
        elif kind == "llama":
            tokenizer = _sentencepiece(header, tokens, types)
        else:
            raise TokenizerError(f"{header.path}: unknown tokenizer {kind!r}; known are gpt2 and llama")
        _add_special_tokens(tokenizer, tokens, types)
        _add_bos(tokenizer, header, tokens)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{header.path}: its tokenizer cannot be built: {error}") from None
    return tokenizer


def adds_bos(header: GGUFHeader) -> bool:
    """Whether text is encoded with a leading BOS; where the file does not say, as llama.cpp does."""
    default = header.text("tokenizer.ggml.model") == "llama" or _pre_tokenizer(header) == "llama-bpe"
    return bool(header.metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(header: GGUFHeader, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _pre_tokenizer(header)
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{header.path}: unknown pre-tokenizer {pre!r} (tokenizer.ggml.pre); "
            f"known are {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = _merges(header, vocab)
    # Llama 3 looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.decoder = decoders.ByteLevel()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("llama-bpe", "qwen2"):
        pattern = Regex(_LLAMA3 if pre == "llama-bpe" else _QWEN2)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, behavior="isolated"), bytes_only]
        )
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        tokenizer.pre_tokenizer = words
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _merges(header: GGUFHeader, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(header, "merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:  # the library would panic
            raise TokenizerError(f"{header.path}: the merge {merge!r} is not of tokens in its vocabulary")
        merges.append((left, right))
    return merges


def _pre_tokenizer(header: GGUFHeader) -> str | None:
    return header.text("tokenizer.ggml.pre")


def _sentencepiece(header: GGUFHeader, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: spaces are letters, what is unknown falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = header.metadata.get("tokenizer.ggml.scores") or ()
    if len(scores) != len(tokens):
        raise TokenizerError(f"{header.path}: {len(scores):,} scores for {len(tokens):,} tokens")
    unknown = header.integer("tokenizer.ggml.unknown_token_id")
    if unknown is None and _UNKNOWN in types:
        unknown = list(types).index(_UNKNOWN)
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=sentencepiece_merges(tokens, types, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        # A normalizer, so that text behind a special token gets its space too, as in llama.cpp.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def sentencepiece_merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the merges that scores imply, best first.

    SentencePiece keeps no merges: of all neighbours that spell a piece it joins those whose piece
    scores highest. So every cut of a piece into two pieces is a merge, ranked by the piece.
    """
    mergeable = {
        token: index for index, token in enumerate(tokens) if types[index] in (_NORMAL, _USER_DEFINED)
    }
    merges = []
    for token in sorted(mergeable, key=lambda token: -scores[mergeable[token]]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in mergeable and cut[1] in mergeable]
        merges += sorted(known, key=lambda cut: (mergeable[cut[0]], mergeable[cut[1]]))
    return merges


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Match control and user-defined tokens whole; control tokens and the unknown one do not decode."""
    from tokenizers import AddedToken

    of_type = {
        kind: [t for t, found in zip(tokens, types, strict=True) if found == kind] for kind in (2, 3, 4)
    }
    special = of_type[_UNKNOWN] + of_type[_CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type[_USER_DEFINED]])


def _add_bos(tokenizer: tokenizers.Tokenizer, header: GGUFHeader, tokens: Sequence[str]) -> None:
    from tokenizers import processors

    bos_id = header.integer("tokenizer.ggml.bos_token_id")
    if bos_id is not None and adds_bos(header):
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )


def _strings(header: GGUFHeader, name: str) -> Sequence[str]:
    value = header.metadata.get(f"tokenizer.ggml.{name}")
    if not value or not isinstance(value[0], str):
        raise TokenizerError(
            f"{header.path} carries no tokenizer: tokenizer.ggml.{name} is missing; convert the model again"
        )
    return list(value)


def named_tokens(header: GGUFHeader) -> dict[str, str]:
    """Return the texts of bos_token, eos_token, unk_token and pad_token, where the file names them."""
    tokens = _strings(header, "tokens")
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: header.integer(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
