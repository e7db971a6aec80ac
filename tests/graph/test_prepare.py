"""Every rewrite of `prepare`, compared in ONNX Runtime with the graph that came in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from efrapq.errors import UnsupportedModelError
from efrapq.graph.from_torch import export_module
from efrapq.graph.prepare import prepare, simplify

F32 = np.float32
Check = Callable[..., ir.Model]


@pytest.fixture
def same(run_ort: Callable[..., list[NDArray[Any]]]) -> Check:
    """(proto, *inputs) → the prepared model, after it computed the same as the original under the same names."""

    def check(proto: onnx.ModelProto, *inputs: NDArray[np.float32], tolerance: float = 2e-6) -> ir.Model:
        before = proto.SerializeToString(deterministic=True)
        model = prepare(proto)
        assert proto.SerializeToString(deterministic=True) == before, "the input was modified"
        prepared = ir.to_proto(model)
        onnx.checker.check_model(prepared, full_check=True)
        assert [o.name for o in prepared.graph.output] == [o.name for o in proto.graph.output]
        assert [i.name for i in prepared.graph.input] == [i.name for i in proto.graph.input]
        expected = run_ort(proto, *inputs, optimized=False)
        actual = run_ort(prepared, *inputs, optimized=False)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
        return model

    return check


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def node_of(model: ir.Model, op: str) -> ir.Node:
    (found,) = [node for node in model.graph if node.op_type == op]
    return found


# BatchNorm.


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("inner", [True, False], ids=["inner", "graph output"])
def test_batchnorm_after_conv_folds(net: Any, images: Any, same: Check, bias: bool, group: int, inner: bool) -> None:
    n = net(channels=4)
    y = n.batchnorm(n.conv("input", "conv", 4, 8, bias=bias, group=group), "bn", 8)
    assert n.constants["bn.scale"].min() < 0 < n.constants["bn.scale"].max()
    model = same(n.model(n.op("Sigmoid", y, "out") if inner else y), images(3, 4))
    assert ops(model) == ({"Conv": 1, "Sigmoid": 1} if inner else {"Conv": 1})
    assert "conv.weight" in model.graph.initializers


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("group", [1, 2])
def test_batchnorm_after_conv_transpose_folds(net: Any, images: Any, same: Check, bias: bool, group: int) -> None:
    n = net(channels=4)
    sources = ["input", n.constant("up.weight", n.weight(4, 6 // group, 3, 3, fan_in=9))]
    if bias:
        sources.append(n.constant("up.bias", n.weight(6, fan_in=1)))
    up = n.op("ConvTranspose", sources, "up", strides=[2, 2], group=group)
    model = same(n.model(n.op("Relu", n.batchnorm(up, "bn", 6), "out")), images(2, 4))
    assert ops(model) == {"ConvTranspose": 1, "Relu": 1}


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("factors", [{}, {"alpha": 0.5, "beta": 3.0}], ids=["plain", "alpha-beta"])
def test_batchnorm_after_gemm_folds(
    net: Any, images: Any, same: Check, trans_b: int, factors: dict[str, float]
) -> None:
    n = net(channels=1, size=3)
    y = n.gemm(n.op("Flatten", "input", "flat"), "fc", 9, 5, trans_b=trans_b)
    n.nodes[-1].attribute.extend(helper.make_attribute(k, v) for k, v in factors.items())
    model = same(n.model(n.op("Relu", n.batchnorm(y, "bn", 5), "out")), images(4, 1, 3))
    assert ops(model) == {"Flatten": 1, "Gemm": 1, "Relu": 1}


def test_batchnorm_folds_in_double_precision(net: Any, images: Any, same: Check) -> None:
    """A tiny variance and a large mean: products in float32 would lose the bias."""
    n = net(channels=2)
    y = n.batchnorm(n.conv("input", "conv", 2, 3), "bn", 3)
    n.constants["bn.var"][:] = F32(1e-9)
    n.constants["bn.mean"][:] = F32(1234.567)
    model = prepare(n.model(y))
    factor = n.constants["bn.scale"].astype(float) / np.sqrt(n.constants["bn.var"].astype(float) + F32(1e-5))
    bias = (n.constants["conv.bias"].astype(float) - n.constants["bn.mean"]) * factor + n.constants["bn.shift"]
    value = node_of(model, "Conv").inputs[2]
    assert value is not None
    assert value.const_value is not None
    assert np.abs(value.const_value.numpy() - bias).max() <= 1e-7 * np.abs(bias).max()


def test_batchnorm_after_relu_stays(net: Any, images: Any, same: Check) -> None:
    n = net()
    y = n.batchnorm(n.op("Relu", n.conv("input", "conv", 3, 4), "relu"), "bn", 4)
    assert ops(same(n.model(y), images(2)))["BatchNormalization"] == 1


def test_batchnorm_with_another_reader_of_the_layer_stays(net: Any, images: Any, same: Check) -> None:
    n = net()
    c = n.conv("input", "conv", 3, 4)
    y = n.op("Add", [n.batchnorm(c, "bn", 4), c], "out")
    assert ops(same(n.model(y), images(2)))["BatchNormalization"] == 1


def test_batchnorm_of_a_graph_output_stays(net: Any, images: Any, same: Check) -> None:
    n = net()
    c = n.conv("input", "conv", 3, 4)
    proto = n.model(n.batchnorm(c, "bn", 4))
    proto.graph.output.append(helper.make_tensor_value_info("conv", onnx.TensorProto.FLOAT, ["N", 4, 8, 8]))
    assert ops(same(proto, images(2)))["BatchNormalization"] == 1


def test_batchnorm_after_add_stays(net: Any, images: Any, same: Check) -> None:
    n = net()
    y = n.op("Add", [n.conv("input", "a", 3, 4), n.conv("input", "b", 3, 4)], "sum")
    assert ops(same(n.model(n.batchnorm(y, "bn", 4)), images(2)))["BatchNormalization"] == 1


def test_two_batchnorms_in_a_row_fold(net: Any, images: Any, same: Check) -> None:
    n = net()
    y = n.batchnorm(n.batchnorm(n.conv("input", "conv", 3, 4), "bn1", 4), "bn2", 4)
    assert ops(same(n.model(y), images(2))) == {"Conv": 1}


# Pools of the whole image.


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2]], ids=str)
def test_mean_becomes_a_pool(net: Any, images: Any, same: Check, keepdims: int, opset: int, axes: list[int]) -> None:
    n = net()
    c = n.op("Relu", n.conv("input", "conv", 3, 4), "relu")
    if opset < 18:
        m = n.op("ReduceMean", c, "mean", axes=axes, keepdims=keepdims)
    else:
        m = n.op("ReduceMean", [c, n.constant("axes", np.array(axes))], "mean", keepdims=keepdims)
    model = same(n.model(n.op("Sigmoid", m, "out"), opset=opset), images(2))
    expected = {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Sigmoid": 1}
    assert ops(model) == expected | ({} if keepdims else {"Flatten": 1})


@pytest.mark.parametrize("axes", [[1], [2], [1, 2], [1, 2, 3]], ids=str)
def test_other_means_stay(net: Any, images: Any, same: Check, axes: list[int]) -> None:
    n = net()
    m = n.op("ReduceMean", n.conv("input", "conv", 3, 4), "mean", axes=axes, keepdims=1)
    model = same(n.model(n.op("Sigmoid", m, "out")), images(2))
    assert ops(model)["ReduceMean"] == 1
    assert ops(model)["GlobalAveragePool"] == 0


# Initializers and leftovers.


def test_shared_weights_are_separated(net: Any, images: Any, same: Check) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "conv", 3, 3), "a")
    b = n.op("Conv", [a, "conv.weight", "conv.bias"], "b", pads=[1] * 4)
    model = same(n.model(n.op("Conv", [b, "conv.weight", "conv.bias"], "c", pads=[1] * 4)), images(2))
    for position in (1, 2):
        names = [node.inputs[position].name for node in model.graph if node.op_type == "Conv"]  # type: ignore[union-attr]
        assert len(set(names)) == 3
    for node in model.graph:
        for value in node.inputs:
            assert value is None or value.const_value is None or len(list(value.uses())) == 1


def test_shared_weight_with_two_batchnorms(net: Any, images: Any, same: Check) -> None:
    """Folding one must not change the other."""
    n = net()
    a = n.batchnorm(n.conv("input", "conv", 3, 3), "bn1", 3)
    b = n.batchnorm(n.op("Conv", [a, "conv.weight", "conv.bias"], "b", pads=[1] * 4), "bn2", 3)
    assert ops(same(n.model(b), images(2))) == {"Conv": 2}


@pytest.mark.parametrize("at_end", [False, True], ids=["inner", "graph output"])
def test_dropout_and_identity_go(net: Any, images: Any, same: Check, at_end: bool) -> None:
    n = net()
    c = n.op("Identity", n.op("Dropout", n.conv("input", "conv", 3, 4), "drop"), "same")
    model = same(n.model(c if at_end else n.op("Relu", c, "out")), images(2))
    if not at_end:
        assert ops(model) == {"Conv": 1, "Relu": 1}


def test_constant_nodes_become_initializers(net: Any, images: Any, same: Check) -> None:
    n = net()
    weight = n.weight(4, 3, 1, 1, fan_in=3)
    n.nodes.append(helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight)))
    model = same(n.model(n.op("Conv", ["input", "w"], "out")), images(2))
    assert ops(model) == {"Conv": 1}
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(2.5, 1.0), (1.0, -0.5), (0.1, 0.0)])
def test_gemm_factors_fold(net: Any, images: Any, same: Check, trans_b: int, alpha: float, beta: float) -> None:
    n = net(channels=1, size=3)
    y = n.gemm(n.op("Flatten", "input", "flat"), "fc", 9, 5, trans_b=trans_b)
    n.nodes[-1].attribute.extend([helper.make_attribute("alpha", alpha), helper.make_attribute("beta", beta)])
    gemm = node_of(same(n.model(y), images(4, 1, 3)), "Gemm")
    assert gemm.attributes.get_float("alpha", 1.0) == gemm.attributes.get_float("beta", 1.0) == 1.0


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 17, 18, 21])
def test_opsets(net: Any, images: Any, same: Check, opset: int) -> None:
    n = net()
    c = n.batchnorm(n.conv("input", "conv", 3, 4), "bn", 4)
    if opset < 11:
        r = n.op("Clip", c, "relu6", min=0.0, max=6.0)
    else:
        r = n.op("Clip", [c, n.constant("low", np.array(0, F32)), n.constant("high", np.array(6, F32))], "relu6")
    p = n.op("AveragePool", r, "pool", kernel_shape=[2, 2], strides=[2, 2])
    model = same(n.model(n.gemm(n.op("Flatten", p, "flat"), "fc", 64, 5), opset=opset), images(3))
    assert model.opset_imports[""] == max(opset, 13)
    assert ops(model) == {"Conv": 1, "Clip": 1, "AveragePool": 1, "Flatten": 1, "Gemm": 1}


def test_whole_network(residual_net: Any, images: Any, same: Check) -> None:
    model = same(residual_net(), images(4))
    assert ops(model)["BatchNormalization"] == 0
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_prepare_is_deterministic_and_idempotent(residual_net: Any) -> None:
    first = ir.to_proto(prepare(residual_net())).SerializeToString(deterministic=True)
    assert ir.to_proto(prepare(residual_net())).SerializeToString(deterministic=True) == first
    again = prepare(onnx.ModelProto.FromString(first))
    for name, value in prepare(residual_net()).graph.initializers.items():
        assert np.array_equal(again.graph.initializers[name].const_value.numpy(), value.const_value.numpy())  # type: ignore[union-attr]


def test_nodes_with_equal_or_no_names_get_their_own(net: Any) -> None:
    n = net()
    y = n.conv(n.conv(n.conv("input", "a", 3, 3), "b", 3, 3), "c", 3, 3)
    for node, name in zip(n.nodes, ("twin", "", "twin"), strict=True):
        node.name = name
    names = [node.name for node in prepare(n.model(y)).graph]
    assert len(set(names)) == 3
    assert "" not in names


def test_simplify_leaves_batchnorm(residual_net: Any) -> None:
    assert ops(simplify(residual_net()))["BatchNormalization"] == 3


def test_metadata_stays_and_traces_go(net: Any) -> None:
    n = net()
    proto = n.model(n.conv("input", "out", 3, 4))
    helper.set_model_props(proto, {"mean": "0.5"})
    proto.graph.node[0].doc_string = "/home/somebody/train.py:12"
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "stack_trace", "/home/somebody/train.py:12"
    model = prepare(proto)
    assert dict(model.metadata_props) == {"mean": "0.5"}
    assert b"somebody" not in ir.to_proto(model).SerializeToString()


def test_missing_operator_set_is_an_error(net: Any) -> None:
    n = net()
    proto = n.model(n.conv("input", "out", 3, 4))
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(UnsupportedModelError):
        prepare(proto)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torch_module_is_exported_in_evaluation_mode(
    run_ort: Callable[..., list[NDArray[Any]]], images: Any, training: bool
) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        module(torch.from_numpy(images(16)))  # running statistics worth folding
    module.train(training)
    proto = export_module(module, (3, 8, 8))
    assert module.training == training
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    model = prepare(proto)
    assert ops(model)["BatchNormalization"] == ops(model)["Dropout"] == 0
    x = images(5, seed=1)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(run_ort(ir.to_proto(model), x)[0] - expected).max() <= 1e-5


def test_module_that_torch_cannot_trace() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UnsupportedModelError, match=r"could not export"):
        export_module(Branching(), (3, 8, 8))
