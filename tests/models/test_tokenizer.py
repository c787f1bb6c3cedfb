"""Tokenizers, held to transformers, to each other and to published counts."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from sentencepiece import SentencePieceProcessor

from quantkit.errors import TokenizerError
from quantkit.formats.gguf_header import GGUFHeader
from quantkit.models import gguf_tokenizer
from quantkit.models.tokenizer import Tokenizer
from tests.paths import mistral_spm_model, shared_data, smollm2_gguf

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "don't I'LL we've",
    "x = 12345 + 6.78e-9;",
    "def f(a):\n    return {'b': a[0]}\n\n\n# done\t\t!",
    "   \n \r\n  leading, trailing  ",
    "été naïve ﬁ Straße",
    "日本語のテキスト 中文 한국어 العربية",
    "😀👩‍👩‍👧 🇫🇷",
    "a\u200bb\u00a0c\ufeffd",
]
WITH_SPECIAL = "<|im_start|>user\nhi there<|im_end|>\n<|endoftext|>"
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3 <s>?"},
]


@cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(GGUFHeader(smollm2_gguf()))


@cache
def smollm2_of_transformers() -> Any:
    path = smollm2_gguf()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@cache
def mistral() -> Tokenizer:
    return Tokenizer.from_directory(shared_data("mistral-7b-instruct-v0.2"))


@pytest.fixture
def spm_directory(tmp_path: Path) -> Path:
    shutil.copy(mistral_spm_model(), tmp_path / "tokenizer.model")
    return tmp_path


def wiki() -> str:
    return shared_data("text", "wiki.test.raw").read_text(encoding="utf-8")


def write_gguf(path: Path, model: str, tokens: list[str], types: list[int], **settings: Any) -> GGUFHeader:
    """Write a GGUF that holds a tokenizer and the metadata transformers wants beside it."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 2, "vocab_size": len(tokens),
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in settings.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        prefix = "tokenizer." if name == "chat_template" else "tokenizer.ggml."
        add[type(value)](prefix + name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFHeader(path)


def spm_gguf(path: Path, **settings: Any) -> GGUFHeader:
    """Write Mistral's SentencePiece vocabulary as llama.cpp's converter does."""
    model = SentencePieceProcessor(model_file=str(mistral_spm_model()))
    size = model.get_piece_size()
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
    types = [next((number for test, number in kinds if test(i)), 1) for i in range(size)]
    tokens = [model.id_to_piece(i) for i in range(size)]
    scores = [float(model.get_score(i)) for i in range(size)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_gguf(path, "llama", tokens, types, scores=scores, **ids, **settings)


@pytest.mark.parametrize("text", [*CORPUS, WITH_SPECIAL], ids=repr)
def test_smollm2_ids_are_those_of_transformers(text: str) -> None:
    ids = smollm2().encode(text)
    assert ids == smollm2_of_transformers()(text)["input_ids"]
    spoken = text.replace("<|im_start|>", "").replace("<|im_end|>", "").replace("<|endoftext|>", "")
    assert smollm2().decode(ids) == spoken


def test_smollm2_cuts_out_every_digit_first() -> None:
    """As its own tokenizer.json and llama.cpp do; transformers skips this step when it reads the GGUF."""
    split = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    )
    reference = tokenizers.Tokenizer.from_str(smollm2_of_transformers().backend_tokenizer.to_str())
    reference.pre_tokenizer = split
    for text in ["  12", "a  5", "\n\n 7", "３４ ½ ٣", wiki()[:300_000]]:
        assert smollm2().encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert smollm2().encode("  12") == [256, 33, 34]  # both spaces are one token


def test_smollm2_chat_is_that_of_transformers() -> None:
    reference = smollm2_of_transformers()
    for generate in (True, False):
        text = smollm2().apply_chat_template(CHAT, add_generation_prompt=generate)
        assert text == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generate)
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert smollm2().encode_chat(CHAT) == expected


def test_smollm2_special_ids() -> None:
    tokenizer = smollm2()
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_bos=False)
    assert tokenizer.encode("hi", add_bos=True) == [1, *tokenizer.encode("hi")]
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "hi"


def test_mistral_count_and_sentencepiece_agreement(spm_directory: Path) -> None:
    from_json, from_spm = mistral(), Tokenizer.from_directory(spm_directory)
    text = wiki()
    ids = from_json.encode(text, add_bos=True)
    assert len(ids) == 328_880
    assert from_spm.encode(text) == ids
    assert from_spm.decode(ids) == text == from_json.decode(ids)
    for sample in [*CORPUS, "a<s> b</s>c", "  <s>  x", "\x00\x7f", "<0x41>"]:
        assert from_spm.encode(sample) == from_json.encode(sample)
        assert from_spm.decode(from_spm.encode(sample)) == from_json.decode(from_json.encode(sample))
    for tokenizer in (from_json, from_spm):
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 32000)
        assert tokenizer.encode("hi") == tokenizer.encode("hi", add_bos=True) == [1, 12014]


def test_mistral_from_gguf_is_sentencepieces(spm_directory: Path) -> None:
    header = spm_gguf(spm_directory / "m.gguf")
    tokenizer, reference = Tokenizer.from_gguf(header), Tokenizer.from_directory(spm_directory)
    published = json.loads(shared_data("mistral-7b-instruct-v0.2", "tokenizer.json").read_text())["model"][
        "merges"
    ]
    built = json.loads(gguf_tokenizer.build(header).to_str())["model"]["merges"]
    assert [tuple(merge) for merge in built] == [tuple(merge.split(" ")) for merge in published]
    for text in [*CORPUS, "a<s> b</s>c", "\x00\x7f", wiki()[:400_000]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    bare = Tokenizer.from_gguf(
        spm_gguf(spm_directory / "b.gguf", add_space_prefix=False, add_bos_token=False)
    )
    assert bare.encode("hi there") == [5365, 736]  # hi, ▁there
    assert bare.decode(bare.encode(" hi")) == " hi"


def test_stories_ids_are_the_references() -> None:
    tokenizer = Tokenizer.from_directory(shared_data("stories260K"))
    reference = json.loads(shared_data("stories260K", "REFERENCE.json").read_text())
    ids = tokenizer.encode(shared_data("text", "tinystories_val_1000.txt").read_text(encoding="utf-8"))
    assert len(ids) == reference["ids_total"] == 393_019
    assert ids[: len(reference["first_ids"])] == reference["first_ids"]


BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def byte_level_gguf(path: Path, pre: str, **settings: Any) -> GGUFHeader:
    """Train a small byte-level BPE on the corpus and write it with a control and a user-defined token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=BYTES, show_progress=False)
    library.train_from_iterator(CORPUS * 3 + ["12 123 1234 12345"] * 5, trainer)
    model = json.loads(library.to_str())["model"]
    tokens = [*model["vocab"], "<|begin|>", "<tool_call>"]
    types = [1] * len(model["vocab"]) + [3, 4]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 2}
    return write_gguf(path, "gpt2", tokens, types, merges=merges, pre=pre, **ids, **settings)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "default"])
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    header = byte_level_gguf(tmp_path / "t.gguf", pre)
    tokenizer = Tokenizer.from_gguf(header)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in [*CORPUS, "1234567", "a<|begin|>b <tool_call> c"]:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_bos=False) == expected
    assert (tokenizer.encode("x")[:1] == [tokenizer.bos_id]) == (pre == "llama-bpe")
    assert tokenizer.decode(tokenizer.encode("a<|begin|>b <tool_call> c")) == "ab <tool_call> c"


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_gguf(tmp_path / "t.gguf", "qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("source", "model_type"),
    [
        ("smollm2", None),
        ("smollm2", "llama"),
        ("spm-gguf", "llama"),
        ("llama-bpe", "llama"),
        ("qwen2", "qwen2"),
    ],
)
def test_saved_tokenizers_load_in_transformers(source: str, model_type: str | None, tmp_path: Path) -> None:
    if source == "smollm2":
        tokenizer = smollm2()
    elif source == "spm-gguf":
        tokenizer = Tokenizer.from_gguf(spm_gguf(tmp_path / "m.gguf", chat_template="{{ bos_token }}x"))
    else:
        tokenizer = Tokenizer.from_gguf(byte_level_gguf(tmp_path / "t.gguf", source))
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save(out)
    if model_type:
        (out / "config.json").write_text(json.dumps({"model_type": model_type}))
    reference = transformers.AutoTokenizer.from_pretrained(out)
    again = Tokenizer.from_directory(out)
    for text in [*CORPUS, "1234567", "  12"]:
        ids = tokenizer.encode(text)
        assert reference(text)["input_ids"] == ids
        assert again.encode(text) == ids
        assert reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (reference.bos_token_id, reference.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_ids[0])
    assert (again.bos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids)
    assert reference.chat_template == again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("source", ["smollm2", "json", "spm"])
@pytest.mark.parametrize(
    "text", ["Hello  world, 日本語 😀👩‍👩‍👧!", " é 🇫🇷 中", "😀", "  x", "\n\n  return 1"]
)
def test_streaming_adds_up_and_never_splits_a_character(source: str, text: str, spm_directory: Path) -> None:
    tokenizer = {
        "smollm2": smollm2,
        "json": mistral,
        "spm": lambda: Tokenizer.from_directory(spm_directory),
    }[source]()
    ids = tokenizer.encode(text, add_bos=True)
    ids.insert(len(ids) // 2, tokenizer.eos_ids[0])  # a special token leaves no trace and no gap
    if tokenizer.decode(ids) != text:  # it fell between the bytes of a character
        ids = tokenizer.encode(text, add_bos=True)
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert stream.finish() == ""


def test_streaming_an_unfinished_character() -> None:
    ids = smollm2().encode("ok 😀", add_bos=False)
    stream = smollm2().stream()
    assert "".join(stream.feed(token) for token in ids[:-1]).rstrip() == "ok"
    assert set(stream.finish().strip()) == {"\ufffd"}


def test_streaming_is_linear() -> None:
    tokenizer = mistral()
    lengths = []
    stream = tokenizer.stream()
    stream._decode = lambda ids: (lengths.append(len(ids)), tokenizer.decode(ids))[1]
    for token in tokenizer.encode("word and another 😀 word, " * 50):
        stream.feed(token)
    assert max(lengths) < 12


def test_mistral_chat_templates_agree(spm_directory: Path) -> None:
    (spm_directory / "config.json").write_text('{"model_type": "mistral"}')
    built_in, own = Tokenizer.from_directory(spm_directory), mistral()
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(shared_data("mistral-7b-instruct-v0.2"))
    text = own.apply_chat_template(CHAT)
    assert text == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert built_in.apply_chat_template(CHAT) == text
    ids = own.encode_chat(CHAT)
    assert ids == built_in.encode_chat(CHAT)
    assert ids.count(1) == 2  # one at the start, one that the user spelled out
    for tokenizer in (built_in, own):
        with pytest.raises(TokenizerError, match="the chat template fails"):
            tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_no_template_is_an_error(spm_directory: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.from_directory(spm_directory).encode_chat(CHAT)


TEMPLATE = (
    "{%- for m in messages %}\n"
    "  {%- if loop.index0 > 1 %}{% break %}{% endif %}\n"
    "  {% generation %}{{ m | tojson }}{% endgeneration %}\n"
    "{%- endfor %}\n"
    "{{ strftime_now('%Y') | length }}{{ 'none' if tools is none }}{% if pad_token %}pad{% endif %}"
)


def test_template_environment_is_that_of_transformers(spm_directory: Path) -> None:
    (spm_directory / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "<é & 'x'>"}] * 3
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(shared_data("mistral-7b-instruct-v0.2"))
    expected = reference.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    tokenizer = Tokenizer.from_directory(spm_directory)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == expected
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(TokenizerError, match="unsafe"):
        tokenizer.apply_chat_template(messages)


def test_settings_beside_a_sentencepiece_model(spm_directory: Path) -> None:
    config = {
        "add_bos_token": False,
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": [{"name": "other", "template": "o"}, {"name": "default", "template": "d"}],
        "added_tokens_decoder": {"32000": {"content": "<|im_end|>"}, "1": {"content": "<s>"}},
    }
    (spm_directory / "tokenizer_config.json").write_text(json.dumps(config))
    (spm_directory / "generation_config.json").write_text('{"eos_token_id": [32000, 2]}')
    tokenizer = Tokenizer.from_directory(spm_directory)
    assert tokenizer.encode("hi<|im_end|>") == [12014, 32000]
    assert tokenizer.decode([12014, 32000]) == "hi"
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((32000, 2), 32001)
    assert tokenizer.chat_template == "d"
    out = spm_directory / "out"
    out.mkdir()
    tokenizer.save(out)
    assert Tokenizer.from_directory(out).encode("hi<|im_end|>") == [12014, 32000]


def test_truncation_in_tokenizer_json_is_ignored(tmp_path: Path) -> None:
    raw = json.loads(shared_data("stories260K", "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(tokenizer.encode("Once upon a time there was a dog")) > 6
    assert tokenizer.bos_id is None  # nothing beside the file names it
    with pytest.raises(TokenizerError, match="no BOS"):
        tokenizer.encode("x", add_bos=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, b"", "has no tokenizer: put tokenizer.json or tokenizer.model there"),
        ("tokenizer.json", b"{}", r"tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer.json", b'{"model"', r"tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer.model", b"\x00\xffgarbage", r"tokenizer.model cannot be read as a SentencePiece model"),
        ("tokenizer.model", b"", r"tokenizer.model cannot be read as a SentencePiece model"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config.json holds a list"),
    ],
)
def test_missing_and_broken_files(tmp_path: Path, file: str | None, content: bytes, message: str) -> None:
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("model", "tokens", "settings", "message"),
    [
        ("bert", ["a"], {}, "unknown tokenizer 'bert'; known are gpt2 and llama"),
        (
            "gpt2",
            ["a"],
            {"pre": "tekken", "merges": ["a b"]},
            "unknown pre-tokenizer 'tekken'.*known are default",
        ),
        ("gpt2", ["a"], {"merges": ["a b"]}, "unknown pre-tokenizer None"),
        ("gpt2", ["a"], {"pre": "gpt-2"}, r"tokenizer.ggml.merges is missing"),
        ("gpt2", ["a", "b"], {"pre": "gpt-2", "merges": ["a b"]}, "the merge 'a b' is not of tokens"),
        ("gpt2", ["a", "a"], {"pre": "gpt-2", "merges": ["a b"]}, "2 tokens, 1 of them distinct"),
        ("llama", ["a", "b"], {"scores": [0.5]}, "1 scores for 2 tokens"),
        ("llama", ["a"], {"scores": [0.5], "bos_token_id": 7}, "cannot be built"),
    ],
)
def test_broken_gguf_tokenizers(
    tmp_path: Path, model: str, tokens: list[str], settings: dict[str, Any], message: str
) -> None:
    header = write_gguf(tmp_path / "t.gguf", model, tokens, [1] * len(tokens), **settings)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(header)
