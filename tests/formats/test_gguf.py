"""GGUF headers and tensors, held to the gguf package and to transformers; broken files are refused."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from quantkit.config import ModelConfig, config_from_dict
from quantkit.errors import CheckpointError, ConfigError, QuantkitError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.gguf import GGUFCheckpoint, gguf_name
from quantkit.formats.gguf_header import GGML_TYPES, GGUFHeader
from quantkit.models.loader import load
from tests.paths import ROOT, smollm2_gguf

TINY = ModelConfig(
    name="tiny", architecture="llama", vocab_size=96, hidden_size=64, intermediate_size=96, n_layers=2,
    n_heads=4, n_kv_heads=2, head_dim=16, max_context=128, rope_theta=10000.0, norm_eps=1e-5, dtype="fp32",
    bos_token_id=1, eos_token_ids=(2, 5),
)  # fmt: skip


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face name."""
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) * 0.2 for spec in config.tensors}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp's converter does: row i of a head, then its RoPE partner i + head_dim / 2."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + i + side * half for h in range(heads) for i in range(half) for side in (0, 1)]
    return rows[order]


def write_gguf(
    path: Path,
    config: ModelConfig = TINY,
    weights: Mapping[str, np.ndarray] | None = None,
    kind: Type = Type.F32,
    metadata: Mapping[str, int | float | str] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a model; `metadata` is added under the architecture's prefix, `extra` are tensors as they are."""
    arch = "qwen2" if config.architecture == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key if "." in key and key.startswith("split") else f"{arch}.{key}", value)
    for name, array in (weights or random_weights(config)).items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        stored = interleaved(array, heads) if heads and arch == "llama" else array
        stored_kind = kind if stored.ndim == 2 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(stored, stored_kind), raw_dtype=stored_kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny_Model.F32.gguf")


def test_config_comes_from_metadata_and_tensors(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.config == replace(TINY, name="tiny-model.f32")
    assert checkpoint.schemes == {}
    assert checkpoint.stored_bytes == 4 * TINY.parameters


@pytest.mark.parametrize(
    ("kind", "torch_dtype", "dtype"),
    [
        (Type.F32, torch.float32, "fp32"),
        (Type.F16, torch.float16, "fp16"),
        (Type.BF16, torch.bfloat16, "bf16"),
        (Type.Q8_0, torch.float32, "bf16"),
        (Type.Q4_0, torch.float32, "bf16"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_tensors_come_back_half_split(
    tmp_path: Path, kind: Type, torch_dtype: torch.dtype, dtype: str
) -> None:
    weights = random_weights(TINY)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", TINY, weights, kind))
    assert checkpoint.config.dtype == dtype
    stored = 0
    for spec in checkpoint.config.tensors:
        original, tensor = weights[spec.name], checkpoint.read(spec)
        if original.ndim == 1:
            expected = torch.from_numpy(original)
        else:
            packed = gguf.quantize(original, kind)
            expected = torch.from_numpy(gguf.dequantize(packed, kind))
            assert tensor.dtype == torch_dtype
        assert torch.equal(tensor.float(), expected), spec.name
        stored += original.nbytes if original.ndim == 1 else packed.nbytes
    assert checkpoint.stored_bytes == stored
    before = [checkpoint.read(spec).clone() for spec in checkpoint.config.tensors]
    checkpoint.drop_pages()
    for spec, tensor in zip(checkpoint.config.tensors, before, strict=True):
        assert torch.equal(checkpoint.read(spec), tensor)


def test_plain_matrices_are_mapped_not_copied(tiny: Path) -> None:
    checkpoint = GGUFCheckpoint(tiny)
    spec = checkpoint.config.tensors[0]
    assert checkpoint.read(spec).data_ptr() == checkpoint.read(spec).data_ptr()


@pytest.mark.parametrize("variant", ["llama", "tied", "mistral", "qwen2", "llama3"])
def test_transformers_computes_the_same_from_the_converted_config(tmp_path: Path, variant: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "llama": {"qkv_bias": True, "o_bias": True},
        "tied": {"tie_embeddings": True, "head_dim": 32},
        "mistral": {"architecture": "mistral", "sliding_window": 7},
        "qwen2": {"architecture": "qwen2", "qkv_bias": True, "rope_theta": 1e6},
        "llama3": {"rope_theta": 5e5},
    }
    config = replace(TINY, **changes[variant])
    metadata: dict[str, int] = {}
    if config.sliding_window:
        metadata["attention.sliding_window"] = config.sliding_window
    if config.head_dim != 16:
        metadata["attention.key_length"] = config.head_dim
        metadata["attention.value_length"] = config.head_dim
    extra = {"rope_freqs.weight": llama3_divisors(config, 8.0)} if variant == "llama3" else {}
    weights = random_weights(config)
    checkpoint = GGUFCheckpoint(
        write_gguf(tmp_path / "m.gguf", config, weights, metadata=metadata, extra=extra)
    )
    raw = checkpoint.hf_config_dict()
    again = config_from_dict(raw, "m", "config.json")
    assert replace(again, rope_scaling=None) == replace(checkpoint.config, rope_divisors=None)

    import transformers

    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**raw), dtype=torch.float32
    )
    loaded = reference.load_state_dict(
        {name: torch.from_numpy(array) for name, array in weights.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_embeddings else [])
    ids = torch.arange(40)[None] % config.vocab_size
    decoder = load(checkpoint, "fp32")
    ours = decoder.logits(decoder.forward(ids, decoder.new_cache(1, 40)))
    with torch.inference_mode():
        # Both compute in float32; only the order of sums differs.
        torch.testing.assert_close(ours, reference(ids).logits, rtol=1e-4, atol=1e-4)


def llama3_divisors(config: ModelConfig, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them: by wavelength, for low 1, high 4, context 8192."""
    divisors = []
    for index in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * index / config.head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_rope_divisors(tmp_path: Path) -> None:
    config = replace(TINY, rope_theta=5e5)
    divisors = llama3_divisors(config, 32.0)
    checkpoint = GGUFCheckpoint(
        write_gguf(tmp_path / "a.gguf", config, extra={"rope_freqs.weight": divisors})
    )
    assert checkpoint.config.rope_divisors == tuple(divisors.tolist())
    assert checkpoint.stored_bytes == 4 * config.parameters  # the divisors are no weights
    assert checkpoint.hf_config_dict()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors[1] = 3.0
    other = GGUFCheckpoint(write_gguf(tmp_path / "b.gguf", config, extra={"rope_freqs.weight": divisors}))
    with pytest.raises(CheckpointError, match=r"cannot be converted.*rope_freqs.weight"):
        other.hf_config_dict()
    ones = np.ones(config.head_dim // 2, dtype=np.float32)
    plain = GGUFCheckpoint(write_gguf(tmp_path / "c.gguf", config, extra={"rope_freqs.weight": ones}))
    assert plain.config.rope_divisors is None


def test_biases_transformers_has_no_place_for_are_not_converted(tmp_path: Path) -> None:
    config = replace(TINY, qkv_bias=True)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", config))
    assert checkpoint.config.qkv_bias
    assert not checkpoint.config.o_bias
    with pytest.raises(CheckpointError, match="cannot be converted"):
        checkpoint.hf_config_dict()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "RoPE scaling 'yarn' by 4.0"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "RoPE scaling 'linear' by 2.0"),
        ({"expert_count": 8}, "expert_count is 8; only 0"),
        ({"rope.dimension_count": 8, "attention.key_length": 16}, "rope.dimension_count is 8; only 16"),
        ({"attention.key_length": 16, "attention.value_length": 8}, "attention.value_length is 8; only 16"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_rope_scaling_that_changes_nothing_is_accepted(tmp_path: Path, kind: str) -> None:
    metadata: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": 1.0}
    GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata))


def test_unknown_architecture_lists_the_known(tiny: Path) -> None:
    raw = tiny.read_bytes().replace(b"llama", b"gemma")
    tiny.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"unknown architecture 'gemma'; known are llama, qwen2"):
        GGUFCheckpoint(tiny)


def test_tensors_that_contradict_the_metadata_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    weights = random_weights(TINY)
    up = "model.layers.1.mlp.up_proj.weight"
    missing = {name: array for name, array in weights.items() if name != up}
    with pytest.raises(CheckpointError, match=r"m.gguf: the tensor blk.1.ffn_up.weight is missing"):
        GGUFCheckpoint(write_gguf(path, weights=missing))
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight has shape \[96, 32\].*imply \[96, 64\]"):
        GGUFCheckpoint(write_gguf(path, weights={**weights, up: weights[up][:, :32]}))
    norm = np.ones(16, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q_norm.weight \[16\] has no place in a llama"):
        GGUFCheckpoint(write_gguf(path, extra={"blk.0.attn_q_norm.weight": norm}))


def test_files_cut_short_are_refused(tiny: Path) -> None:
    raw = tiny.read_bytes()
    header_bytes = min(tensor.offset for tensor in GGUFHeader(tiny).tensors.values())
    cuts = [*range(0, header_bytes, 7), header_bytes, *range(header_bytes, len(raw), len(raw) // 50)]
    for cut in [*cuts, len(raw) - 1]:
        tiny.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match=r"Tiny_Model.F32.gguf is (truncated|empty|no GGUF)"):
            GGUFCheckpoint(tiny)


def test_flipped_bytes_never_crash_or_hang(tiny: Path) -> None:
    raw = tiny.read_bytes()
    header_bytes = min(tensor.offset for tensor in GGUFHeader(tiny).tensors.values())
    rng = random.Random(0)
    messages = []
    for _ in range(800):
        broken = bytearray(raw)
        at = rng.randrange(header_bytes)
        broken[at : at + rng.choice((1, 8))] = rng.choice((b"\xff", b"\xff" * 8, rng.randbytes(1), b"\0"))
        tiny.write_bytes(broken)
        try:
            GGUFCheckpoint(tiny)
        except QuantkitError as error:
            messages.append(str(error))
    assert len(messages) > 400  # the others changed a string, or a value that any number suits
    assert not [text for text in messages if "\n" in text or "tiny" not in text.lower()]


HUGE = struct.pack("<Q", 1 << 60)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"GGML", "is no GGUF file: it begins with b'GGML'"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 1), "GGUF version 1; known are 2 and 3"),
        (4, struct.pack("<I", 4), "GGUF version 4"),
        (8, HUGE, "tensors do not fit"),
        (16, HUGE, "metadata entries do not fit"),
        (24, HUGE, "runs past the end"),
    ],
)
def test_broken_header_fields(tiny: Path, at: int, new: bytes, message: str) -> None:
    raw = bytearray(tiny.read_bytes())
    raw[at : at + len(new)] = new
    tiny.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        GGUFHeader(tiny)


def test_broken_array_and_tensor_fields(tiny: Path) -> None:
    raw = tiny.read_bytes()
    count_at = raw.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    assert raw[count_at : count_at + 8] == struct.pack("<Q", 3)
    tiny.write_bytes(raw[:count_at] + HUGE + raw[count_at + 8 :])
    with pytest.raises(CheckpointError, match=r"elements of tokenizer.ggml.tokens do not fit"):
        GGUFHeader(tiny)
    type_at = raw.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    tiny.write_bytes(raw[:type_at] + struct.pack("<I", 31) + raw[type_at + 4 :])
    with pytest.raises(
        CheckpointError, match=r"blk.0.attn_q.weight has the unknown tensor type 31; known are F32"
    ):
        GGUFHeader(tiny)


def test_missing_file_and_split_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.gguf cannot be read"):
        GGUFHeader(tmp_path / "absent.gguf")
    path = write_gguf(tmp_path / "m.gguf", metadata={"split.count": 3})
    with pytest.raises(CheckpointError, match="one of 3 parts of a split model"):
        GGUFHeader(path)


def test_version_2_is_read(tiny: Path) -> None:
    raw = bytearray(tiny.read_bytes())
    raw[4:8] = struct.pack("<I", 2)  # the layout is the same on little-endian machines
    tiny.write_bytes(raw)
    assert GGUFCheckpoint(tiny).header.version == 2


def test_type_table_is_the_gguf_packages() -> None:
    for number, (name, block, size) in GGML_TYPES.items():
        assert (Type(number).name, gguf.GGML_QUANT_SIZES[Type(number)]) == (name, (block, size))


def test_opening_imports_no_torch(tiny: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from quantkit.formats.checkpoint import open_checkpoint\n"
        f"config = open_checkpoint(Path({str(tiny)!r})).config\n"
        "assert config.vocab_size == 96\n"
        "assert not {'torch', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_smollm2_header_agrees_with_the_gguf_package() -> None:
    path = smollm2_gguf()
    header = GGUFHeader(path)
    assert header.number("llama.attention.layer_norm_rms_epsilon", 0.0) == 1e-5
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert "_values" not in vars(tokens)  # nothing is decoded before it is asked for
    assert (len(tokens), tokens[0], tokens[-1]) == (49152, "<|endoftext|>", "ectable")
    assert sum(tensor.nbytes for tensor in header.tensors.values()) == GGUFCheckpoint(path).stored_bytes
    q = header.tensors["blk.0.attn_q.weight"]
    assert (q.shape, q.type, q.nbytes, q.offset) == ((576, 576), "Q4_1", 576 * 576 // 32 * 20, 33806656)


def test_smollm2_weights_are_those_transformers_loads(tmp_path: Path) -> None:
    """On the first two layers, copied as they are: transformers takes long to read all thirty."""
    source = GGUFCheckpoint(smollm2_gguf())
    config, header = source.config, source.header
    writer = gguf.GGUFWriter(tmp_path / "cut.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in header.tensors.items():
        if not name.startswith("blk.") or name.startswith(("blk.0.", "blk.1.")):
            raw = np.frombuffer(header.data, np.uint8, tensor.nbytes, tensor.offset)
            if tensor.type == "F32":
                writer.add_tensor(name, raw.view(np.float32).reshape(tensor.shape))
            else:
                writer.add_tensor(name, raw.reshape(tensor.shape[0], -1), raw_dtype=Type[tensor.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    import transformers

    checkpoint = GGUFCheckpoint(tmp_path / "cut.gguf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="cut.gguf", dtype=torch.float32
    )
    weights = reference.state_dict()
    for spec in checkpoint.config.tensors:
        assert torch.equal(checkpoint.read(spec).float(), weights[spec.name]), spec.name
