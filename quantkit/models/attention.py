"""Attention by one of four paths: flash (CUDA), quantkit's or PyTorch's fused CPU kernel, or plain matrix products.

The path is chosen once for a model and never falls back in silence. B batch, T queries, S keys; the
queries are the last T of the S positions, and heads share keys in groups.
`calculators/activations.py` lists the tensors of `flash` and `math` in this order: change them together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from calculators.activations import score_rows
from calculators.flash import flash_runs
from quantkit.errors import BackendError
from quantkit.kernels import native

PATHS = ("flash", "math", "native", "sdpa")


def choose_path(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, own: bool = True) -> str:
    """Return the path that `name` means for a model: one of PATHS, or `auto` for the best there is.

    Args:
        name: as above.
        device: where the model runs.
        dtype: compute dtype.
        head_dim: elements of a head.
        own: whether `auto` may be quantkit's kernel.

    Raises:
        BackendError: the path is unknown, or cannot run this dtype or head on this device.
    """
    flash = flash_runs(dtype.itemsize, head_dim) and _has_flash(device)
    fits = native.takes_heads(device, dtype, head_dim)
    if name == "auto" and device.type == "cpu":
        return "native" if own and fits else "sdpa"
    if name == "auto":
        return "flash" if flash else "math"
    if name not in PATHS:
        raise BackendError(f"unknown attention {name!r}; known are auto, {', '.join(PATHS)}")
    if name == "flash" and not flash:
        raise BackendError(
            f"flash attention runs 16-bit dtypes, heads of up to 256 elements in steps of 8 and GPUs from Ampere "
            f"on, not {dtype} with heads of {head_dim} here: choose math"
        )
    if name == "native" and not fits:
        raise BackendError(
            f"native attention runs bfloat16 and heads of up to {native.MOST_HEAD_DIM} elements in steps of 16 on a "
            f"CPU, where the extension is built, not {dtype} with heads of {head_dim} on {device.type}: choose auto"
        )
    if (name == "flash" and device.type == "cpu") or (name == "sdpa" and device.type != "cpu"):
        raise BackendError(f"attention {name!r} does not run on {device.type}: choose auto")
    return name


def _has_flash(device: torch.device) -> bool:
    """Whether FlashAttention-2 runs on a GPU; one that is not there, as in a trace, is taken to be recent."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


class Attention:
    """Attention of T queries to S keys, with the mask that PyTorch's CPU kernel needs.

    Args:
        path: one of PATHS.
        tokens: T.
        keys: S.
        window: keys that a query sees at most, itself among them; None for all before it.
        device: where the mask lies.
    """

    def __init__(self, path: str, tokens: int, keys: int, window: int | None, device: torch.device) -> None:
        self._path, self._window = path, window
        self._visible: torch.Tensor | None = None
        if path == "sdpa" and tokens > 1 and (keys > tokens or window is not None):
            self._visible = ~_hidden(keys - tokens, tokens, keys, window, device)

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return softmax(q K^T / sqrt(head_dim)) V as (B, T, n_heads * head_dim).

        Args:
            q: (B, T, n_heads, head_dim), contiguous.
            keys: (B, n_kv_heads, S, head_dim).
            values: likewise.
        """
        if self._path == "flash":
            return _flash(q, keys, values, self._window)
        if self._path == "math":
            return _math(q, keys, values, self._window)
        if self._path == "native" and q.shape[1] > 1:
            return native.attention(q, keys, values, self._window).flatten(2)
        return _sdpa(q, keys, values, self._visible)


def _hidden(first: int, tokens: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys the queries at positions from `first` on may not see: bool (T, S)."""
    columns = torch.arange(keys, device=device)
    rows = torch.arange(first, first + tokens, device=device)[:, None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return hidden


def _flash(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """FlashAttention-2 as PyTorch carries it; its causal triangle is aligned to the last query and key."""
    tokens, count = q.shape[1], keys.shape[2]
    out = torch.ops.aten._flash_attention_forward(
        q, keys.transpose(1, 2), values.transpose(1, 2), None, None, tokens, count,
        0.0, tokens > 1, False, scale=1 / math.sqrt(q.shape[3]),
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out.flatten(2)


def _math(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """Plain scores, for so many queries at a time that they stay small."""
    batch, tokens, n_heads, _ = q.shape
    count = keys.shape[2]
    by_head = keys.flatten(0, 1).mT, values.flatten(0, 1)  # (B * n_kv_heads, head_dim, S) and its like
    out = torch.empty_like(q)
    step = score_rows(batch * n_heads, count)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        visible_from = None if tokens == 1 else count - tokens + start
        _math_rows(out[:, rows], q[:, rows], *by_head, visible_from, window)
    return out.flatten(2)


def _math_rows(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int | None,
    window: int | None,
) -> None:
    """Write the attention of queries at positions from `first` on; None is one that sees every key.

    Scores are scaled and normalised in float32; the heads of a group stand in for queries.
    """
    batch, tokens, n_heads, head_dim = q.shape
    n_kv_heads, count = keys.shape[0] // batch, keys.shape[2]
    by_group = batch, tokens, n_kv_heads, n_heads // n_kv_heads, head_dim
    grouped = q.view(by_group).permute(0, 2, 3, 1, 4).reshape(batch * n_kv_heads, -1, head_dim)
    scores = torch.bmm(grouped, keys).float().mul_(1 / math.sqrt(head_dim))  # (B * n_kv_heads, G * T, S)
    del grouped
    if first is not None:
        hidden = _hidden(first, tokens, count, window, q.device)
        scores.view(-1, n_heads // n_kv_heads, tokens, count).masked_fill_(hidden, -math.inf)
        del hidden
    scores = torch.softmax(scores, dim=-1).to(q.dtype)
    part = torch.bmm(scores, values).view(batch, n_kv_heads, -1, tokens, head_dim)
    out.view(by_group).copy_(part.permute(0, 3, 1, 2, 4))


def _sdpa(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    batch, tokens, n_heads, head_dim = q.shape
    if tokens == 1:  # the heads of a group stand in for queries, so keys are not repeated
        grouped = q.view(batch, keys.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values).view(batch, 1, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=visible, is_causal=visible is None,
        enable_gqa=n_heads != keys.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)
