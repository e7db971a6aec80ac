"""Gradients through the quantizers of a QDQ graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from efrapq.graph.executor import Executor
from efrapq.graph.straight_through import STRAIGHT_THROUGH

F32 = np.float32


def quantizers(make_model: Callable[..., onnx.ModelProto], zero_point: NDArray[Any], scale: float) -> ir.Model:
    """x → QuantizeLinear → DequantizeLinear → y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    return ir.from_proto(make_model(nodes, {"x": [8]}, {"y": [8]}, {"s": F32(scale), "z": zero_point}, opset=21))


def through(model: ir.Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """y, and what of the gradient of its sum reaches x."""
    x = x.clone().requires_grad_()
    y = Executor(model, instead=STRAIGHT_THROUGH).run({"x": x})["y"]
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(
    ("zero_point", "inside"),
    [
        (np.uint8(128), [1, 1, 1, 1, 1, 1, 0, 0]),
        (np.int8(-3), [1, 1, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_the_numbers_are_exact_and_what_is_clipped_has_no_gradient(
    make_model: Callable[..., onnx.ModelProto], zero_point: NDArray[Any], inside: list[float]
) -> None:
    model = quantizers(make_model, zero_point, 0.1)
    x = torch.tensor([0.0, 0.05, 0.149, -0.05, 1.0, -2.0, 100.0, -100.0])
    y, gradient = through(model, x)
    assert torch.equal(y, Executor(model).run({"x": x})["y"])
    assert gradient.tolist() == inside


def test_random_reals_come_out_bit_for_bit(make_model: Callable[..., onnx.ModelProto]) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        scale = float(torch.rand(()) + 1e-3)
        model = quantizers(make_model, np.uint8(seed * 5), scale)
        x = 300 * scale * torch.randn(8)
        assert torch.equal(through(model, x)[0], Executor(model).run({"x": x})["y"])


def test_without_a_gradient_codes_are_integers(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = quantizers(make_model, np.uint8(0), 0.5)
    executor = Executor(model, instead=STRAIGHT_THROUGH)
    assert executor.run({"x": torch.ones(8)}, ["c"])["c"].dtype == torch.uint8
    assert executor.run({"x": torch.ones(8, requires_grad=True)}, ["c"])["c"].dtype == torch.float32


def test_a_quantized_network_has_the_gradient_of_its_real_numbers(
    residual_net: Callable[..., onnx.ModelProto],
    images: Callable[..., NDArray[np.float32]],
    quantize: Callable[..., Any],
) -> None:
    """At 8 bits the gradient of the exported graph points where the float graph's does."""
    proto, x = residual_net(), images(32)
    file = quantize(proto, x, bits=8).export("portable")
    gradients = []
    for graph, instead in ((proto, None), (file, STRAIGHT_THROUGH)):
        model = ir.from_proto(graph)
        given = torch.from_numpy(x).requires_grad_()
        executor = Executor(model, instead=instead)
        output = str(model.graph.outputs[0].name)
        executor.run({str(model.graph.inputs[0].name): given})[output][:, 0].sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    exact, found = gradients
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0)) > 0.9
    assert float(exact.norm()) > 0
