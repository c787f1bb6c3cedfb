"""`torch.compile` of a user's own module with quantized linears: one graph, the kernels one node of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit.kernels import ops
from quantkit.kernels import triton as kernels
from quantkit.schemes import SCHEMES
from quantkit.tensor import empty_quantized


class Feed(torch.nn.Module):
    """Two quantized linears with something of PyTorch's between."""

    def __init__(self, scheme: str, device: str) -> None:
        super().__init__()
        shapes = ((48, 64), (64, 48)) if scheme == "int8" else ((128, 64), (64, 128))
        weights = (empty_quantized(shape, SCHEMES[scheme], torch.bfloat16, device) for shape in shapes)
        self.up, self.down = (ops.prepare(weight, "triton") for weight in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + ops.linear(torch.relu(ops.linear(x, self.up)), self.down)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-asym", "nf4", "nf4-dq"])
def test_a_module_of_the_users_is_one_graph(scheme: str) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module = Feed(scheme, "meta")
    assert isinstance(module.up, kernels.TiledWeight)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for rows in (1, 5):
        x = torch.empty(2, rows, 64, dtype=torch.bfloat16, device="meta")
        found = compiled(x)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
    nodes = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.quantkit.tiled_linear) == 2
