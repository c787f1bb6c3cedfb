"""The whole forward pass of Llama, Mistral and Qwen2: pre-norm blocks of attention and SwiGLU.

B batch, T tokens of this call, S keys attended to. Where implementations differ, this one follows
transformers: RMSNorm casts back before it multiplies by its weight, RoPE is half-split, cosines are
rounded to the compute dtype, a window of W lets a token see itself and the W - 1 before it.

Tensors are released where they were last used, and overwritten where nobody else reads them: the peak is
what `calculators/activations.py` lists, in this order. Change them together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from quantkit.config import ModelConfig
from quantkit.models.attention import Attention, choose_path
from quantkit.models.cuda_decoder import CudaDecoder, Layers
from quantkit.models.kv_cache import KVCache
from quantkit.models.linear import Block, Fused, Linear, Weight
from quantkit.models.native_decoder import NativeDecoder
from quantkit.models.rope import rope_angles, rope_frequencies, rotate

FUSED = {  # what a backend may run as one matrix: the parts share their input
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class Decoder:
    """A model ready to run.

    Args:
        config: shapes and constants.
        weights: every tensor of `config.tensors` by name, plain ones in `dtype`. In place of the parts that
            `FUSED` lists there may be one matrix of that name.
        dtype: compute dtype.
        attention: `flash`, `math`, `native`, `sdpa`, or `auto` for the best there is on the weights' device.
        fused: whether attention, and whole layers, may take a path of quantkit's own where there is one; else every
            step is an operator of PyTorch's, which is what an estimate describes.

    Raises:
        BackendError: that attention cannot run here.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        dtype: torch.dtype,
        attention: str = "auto",
        fused: bool = True,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.weights = dict(weights)
        self.embedding = self._plain("model.embed_tokens.weight")
        self.blocks = [self._block(f"model.layers.{layer}") for layer in range(config.n_layers)]
        self.norm = self._plain("model.norm.weight")
        self.head = Linear(self.embedding) if config.tie_embeddings else self._linear("lm_head")
        self._frequencies = rope_frequencies(config).to(self.device)
        self.attention = choose_path(attention, self.device, dtype, config.head_dim, own=fused)
        layers = Layers(
            config, self.embedding, self.blocks, self.norm, self.head, self._frequencies, self.attention
        )
        self._native = NativeDecoder.of(config, self.blocks, self.norm, dtype) if fused else None
        self._cuda = CudaDecoder.of(layers, dtype) if fused else None

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights as held: codes, scales and plain tensors; a tied head counts once."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def new_cache(
        self, batch: int, max_tokens: int, kv_bits: int | None = None, kv_group: int = 0
    ) -> KVCache:
        """Return an empty cache for sequences of up to `max_tokens`; see KVCache for bits and group."""
        return KVCache(self.config, batch, max_tokens, self.dtype, kv_bits, self.device, kv_group)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Run T tokens through all layers and return their final, normed states (B, T, hidden).

        Args:
            ids: (B, T) token ids, which follow what `cache` holds.
            cache: extended by T tokens.
        """
        tokens = ids.shape[1]
        cache.check_room(tokens)
        if self._cuda is not None and self._cuda.takes(ids, cache):
            if tokens > 1:
                return self._cuda.prompt(ids, cache)
            return self._cuda.token(ids, cache)[0].clone()[:, None]
        x = F.embedding(ids.contiguous(), self.embedding)  # (B, T, hidden); else it would copy them unseen
        cos, sin = rope_angles(self._frequencies, cache.length, tokens, self.dtype)
        if self._native is not None and self._native.takes(x, cache):
            return self._native(x, cos, sin, cache)
        attention = Attention(self.attention, tokens, cache.keys(tokens), cache.window(tokens), self.device)
        for layer, block in enumerate(self.blocks):
            x.add_(self._attention(x, layer, block, cos, sin, attention, cache))
            x.add_(self._ffn(x, block))
        cache.advance(tokens)
        return self._rms_norm(x, self.norm)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (..., vocab) of final states (..., hidden)."""
        return self.head(states).float()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache: KVCache, chunk: int = 2048) -> torch.Tensor:
        """Run a prompt (B, T) in chunks and return the float32 logits (B, vocab) of its last token."""
        if ids.shape[1] == 1 and self._cuda is not None and self._cuda.takes(ids, cache):
            cache.check_room(1)
            return self._cuda.token(ids, cache)[1].float()
        for piece in ids.split(chunk, dim=1):
            states = self.forward(piece, cache)
        return self.logits(states[:, -1])

    def _attention(
        self,
        x: torch.Tensor,
        layer: int,
        block: Block,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        cache: KVCache,
    ) -> torch.Tensor:
        h = self._rms_norm(x, block.attention_norm)
        heads = (*h.shape[:2], -1, self.config.head_dim)
        if isinstance(block.qkv, Fused):
            q, k, v = (part.view(heads) for part in block.qkv(h))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            project_q, project_k, project_v = block.qkv
            q = rotate(project_q(h).view(heads), cos, sin)  # (B, T, n_heads, head_dim)
            k = rotate(project_k(h).view(heads), cos, sin)  # (B, T, n_kv_heads, head_dim)
            v = project_v(h).view(heads)
        del h
        if cache.hadamard is not None:  # q . k stays as it is, and the keys' outliers are spread
            q = q @ cache.hadamard[0]
            k = k @ cache.hadamard[1]
        keys, values = cache.extend(layer, k, v)  # (B, n_kv_heads, S, head_dim)
        del k, v
        out = attention(q, keys, values)  # (B, T, n_heads * head_dim)
        del q, keys, values
        return block.o(out)

    def _ffn(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        h = self._rms_norm(x, block.ffn_norm)
        if isinstance(block.gate_up, Fused):
            gate, up = block.gate_up(h)
            wide = F.silu(gate)  # (B, T, ffn)
        else:
            project_gate, project_up = block.gate_up
            wide = F.silu(project_gate(h), inplace=True)
            up = project_up(h)
        del h
        wide.mul_(up)
        del up
        return block.down(wide)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self.config.norm_eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight)

    def _block(self, prefix: str) -> Block:
        return Block(
            attention_norm=self._plain(f"{prefix}.input_layernorm.weight"),
            qkv=self._fused(prefix, "self_attn.qkv_proj"),  # type: ignore[arg-type]
            o=self._linear(f"{prefix}.self_attn.o_proj"),
            ffn_norm=self._plain(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._fused(prefix, "mlp.gate_up_proj"),  # type: ignore[arg-type]
            down=self._linear(f"{prefix}.mlp.down_proj"),
        )

    def _linear(self, module: str) -> Linear:
        return Linear(self.weights[f"{module}.weight"], self._bias(module))

    def _fused(self, prefix: str, name: str) -> Fused | tuple[Linear, ...]:
        parts = [f"{prefix}.{part}" for part in FUSED[name]]
        weight = self.weights.get(f"{prefix}.{name}.weight")
        if weight is None:
            return tuple(self._linear(part) for part in parts)
        biases = [bias for part in parts if (bias := self._bias(part)) is not None]
        rows = {spec.name: spec.shape[0] for spec in self.config.tensors}
        bias = torch.cat(biases) if biases else None
        return Fused(Linear(weight, bias), [rows[f"{part}.weight"] for part in parts])

    def _bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self._plain(name) if name in self.weights else None

    def _plain(self, name: str) -> torch.Tensor:
        weight = self.weights[name]
        assert isinstance(weight, torch.Tensor), f"{name} cannot be quantized"
        return weight
