"""What the executor itself does: feeds, outputs, constants, dropping, falling back, failing."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, parser

from efrapq.errors import UnsupportedModelError
from efrapq.graph.executor import Executor, supports

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
<float[4] w = {1, 2, 3, 4}, int64[2] shape = {-1, 4}>
{
    a = Mul(x, w)
    b = Relu(a)
    c = Exp(a)
    d = Add(b, c)
    y = Reshape(d, shape)
}
"""

RESIZE = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1, 2, 3, 4] x) => (float[1, 2, 6, 8] y)
<float[4] scales = {1, 1, 2, 2}>
{
    a = Relu(x)
    [upsample] y = Resize <mode: string = "linear"> (a, , scales)
}
"""


def _executor(text: str) -> Executor:
    return Executor(ir.from_proto(parser.parse_model(text)))


def _in_ort(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


# --- feeds and outputs ------------------------------------------------------------------------------------


def test_without_names_the_graph_outputs_are_returned() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    results = _executor(BRANCHES).run({"x": x})
    a = x * torch.tensor([1.0, 2, 3, 4])
    assert list(results) == ["y"]
    assert torch.equal(results["y"], a.relu() + a.exp())


def test_any_value_may_be_asked_for() -> None:
    x = torch.ones(1, 4)
    results = _executor(BRANCHES).run({"x": x}, ["b", "a", "x", "w"])
    assert list(results) == ["b", "a", "x", "w"]
    assert results["x"] is x
    assert torch.equal(results["a"], torch.tensor([[1.0, 2, 3, 4]]))


def test_a_value_fed_replaces_the_nodes_before_it() -> None:
    results = _executor(BRANCHES).run({"a": torch.zeros(2, 4)}, ["a", "y"])
    assert torch.equal(results["y"], torch.ones(2, 4))


def test_overrides_replace_constants_for_one_run() -> None:
    executor, x = _executor(BRANCHES), torch.ones(1, 4)
    w = torch.full((4,), 5.0)
    assert torch.equal(executor.run({"x": x}, ["a"], overrides={"w": w})["a"], torch.full((1, 4), 5.0))
    assert torch.equal(executor.run({"x": x}, ["a"])["a"], torch.tensor([[1.0, 2, 3, 4]]))


@pytest.mark.parametrize(
    ("feeds", "outputs", "overrides", "problem"),
    [
        ([], None, [], "'x' is not fed"),
        (["x"], ["nothing"], [], "'nothing' is not a value"),
        (["x", "typo"], None, [], "not values of the graph: typo"),
        (["x"], None, ["a"], "not constants of the graph: a"),
    ],
)
def test_names_that_do_not_fit_the_graph_are_errors(
    feeds: list[str], outputs: list[str] | None, overrides: list[str], problem: str
) -> None:
    tensor = torch.ones(1, 4)
    with pytest.raises(ValueError, match=problem):
        _executor(BRANCHES).run(dict.fromkeys(feeds, tensor), outputs, overrides=dict.fromkeys(overrides, tensor))


def test_only_the_nodes_that_the_outputs_need_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    plain = Executor.run_node

    def recorded(self: Executor, node: ir.Node, inputs: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        ran.append(node.op_type)
        return plain(self, node, inputs)

    executor = _executor(BRANCHES)
    monkeypatch.setattr(Executor, "run_node", recorded)
    executor.run({"x": torch.ones(1, 4)}, ["b"])
    assert ran == ["Mul", "Relu"]


def test_intermediate_tensors_are_dropped_once_nothing_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    at_node: dict[str, list[str]] = {}
    plain = Executor.run_node

    def recorded(self: Executor, node: ir.Node, inputs: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        gc.collect()
        at_node[node.op_type] = [name for name, reference in alive.items() if reference() is not None]
        results = plain(self, node, inputs)
        alive[node.outputs[0].name or ""] = weakref.ref(results[0])
        return results

    executor = _executor(BRANCHES)
    monkeypatch.setattr(Executor, "run_node", recorded)
    executor.run({"x": torch.ones(1, 4)})
    assert at_node == {"Mul": [], "Relu": ["a"], "Exp": ["a", "b"], "Add": ["b", "c"], "Reshape": ["d"]}


# --- constants --------------------------------------------------------------------------------------------


def test_constants_hold_initializers_and_constant_nodes() -> None:
    proto = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y)
        <bool[2] mask = {1, 0}, int64 scalar = {3}>
        {
            one = Constant <value_float = 1.0> ()
            more = Constant <value = float[2] {1, 2}> ()
            whole = Constant <value_ints = [4, 5]> ()
            y = Add(x, more)
        }
        """
    )
    for name, kind in (("half", TensorProto.FLOAT16), ("brain", TensorProto.BFLOAT16)):
        proto.graph.initializer.append(helper.make_tensor(name, kind, [2], [1.0, -2.0]))
    constants = Executor(ir.from_proto(proto)).constants
    expected = {
        "half": torch.tensor([1, -2], dtype=torch.float16),
        "brain": torch.tensor([1, -2], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "one": torch.tensor(1.0),
        "more": torch.tensor([1.0, 2.0]),
        "whole": torch.tensor([4, 5]),
    }
    assert constants.keys() == expected.keys()
    for name, constant in constants.items():
        torch.testing.assert_close(constant, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "constant-node"])
def test_packed_int4_codes_become_int8_and_go_through_a_cast(as_node: bool) -> None:
    codes = helper.make_tensor("codes", TensorProto.INT4, [5], [-8, -1, 0, 3, 7])
    nodes = [helper.make_node("Constant", [], ["codes"], value=codes)] if as_node else []
    nodes.append(helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.INT8))
    nodes.append(helper.make_node("DequantizeLinear", ["wide", "scale"], ["y"]))
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5])],
        [scale] if as_node else [codes, scale],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    executor = Executor(ir.from_proto(model))
    assert executor.constants["codes"].dtype == torch.int8
    assert executor.run({})["y"].tolist() == [-4.0, -0.5, 0.0, 1.5, 3.5]


def test_a_constant_that_torch_cannot_hold_is_named() -> None:
    words = helper.make_tensor("words", TensorProto.STRING, [1], [b"a"])
    result = helper.make_tensor_value_info("y", TensorProto.STRING, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["words"], ["y"])], "g", [], [result], [words])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    with pytest.raises(UnsupportedModelError, match="initializer 'words': tensors of type STRING"):
        Executor(model)


# --- single nodes -----------------------------------------------------------------------------------------


def test_run_node_runs_one_node_on_the_given_inputs() -> None:
    model = ir.from_proto(parser.parse_model(BRANCHES))
    relu = next(node for node in model.graph if node.op_type == "Relu")
    (result,) = Executor(model).run_node(relu, [torch.tensor([-1.0, 2.0])])
    assert result.tolist() == [0.0, 2.0]


def test_integer_shape_arithmetic_stays_on_the_cpu_as_int64() -> None:
    executor = _executor(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, C, H, W] x) => (float[M, K] y)
        <int64 zero = {0}, int64[1] axis = {0}, int64[1] rest = {-1}>
        {
            shape = Shape(x)
            n = Gather(shape, zero)
            first = Unsqueeze(n, axis)
            both = Concat <axis = 0> (first, rest)
            y = Reshape(x, both)
        }
        """
    )
    results = executor.run({"x": torch.zeros(2, 3, 4, 5)}, ["shape", "both", "y"])
    assert results["shape"].dtype == results["both"].dtype == torch.int64
    assert results["both"].tolist() == [2, -1]
    assert results["y"].shape == (2, 60)


# --- what the table lacks ---------------------------------------------------------------------------------


def test_supports_knows_the_table() -> None:
    assert supports("", "Conv")
    assert supports("ai.onnx", "Conv")
    assert not supports("", "Resize")
    assert not supports("com.microsoft", "Conv")


def test_a_node_that_the_table_lacks_runs_through_ort() -> None:
    proto = parser.parse_model(RESIZE)
    executor = Executor(ir.from_proto(proto))
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
    assert executor.fallback_nodes == ("upsample",)
    for _ in range(2):  # the second time from the session that was kept
        result = executor.run({"x": torch.from_numpy(x)})["y"]
        np.testing.assert_array_equal(result.numpy(), _in_ort(proto, x=x)[0])
        assert not result.requires_grad


def test_fallback_gives_all_outputs_and_takes_other_types_of_input() -> None:
    executor = _executor(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N] x) => (float[K] values, int64[K] indices)
        <int64[1] k = {2}>
        { values, indices = TopK(x, k) }
        """
    )
    assert executor.fallback_nodes == ("values",)
    for x in (torch.tensor([3.0, 1.0, 2.0]), torch.tensor([3, 1, 2])):
        results = executor.run({"x": x})
        assert results["values"].tolist() == [3, 2]
        assert results["values"].dtype == x.dtype
        assert results["indices"].tolist() == [0, 2]


def test_a_node_that_neither_knows_is_named() -> None:
    executor = _executor(
        """
        <ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
        g (float[N] x) => (float[N] y)
        { [odd] y = acme.Frobnicate(x) }
        """
    )
    with pytest.raises(UnsupportedModelError, match=r"node 'odd' \(acme\.Frobnicate\) cannot be run"):
        executor.run({"x": torch.ones(2)})


def _conditional(read: str) -> onnx.ModelProto:
    """y = 1 or y = -`read`, as the condition has it."""
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, [1])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    then = helper.make_graph([helper.make_node("Constant", [], ["r"], value=one)], "then", [], [value])
    otherwise = helper.make_graph([helper.make_node("Neg", [read], ["r"])], "else", [], [value], [one])
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("If", ["condition"], ["y"], "choice", then_branch=then, else_branch=otherwise)],
            "g",
            [
                helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def test_self_contained_control_flow_runs_through_ort() -> None:
    executor = Executor(ir.from_proto(_conditional("one")))
    assert executor.fallback_nodes == ("choice",)
    assert executor.run({"condition": torch.tensor(True)})["y"].tolist() == [1.0]
    assert executor.run({"condition": torch.tensor(False)})["y"].tolist() == [-1.0]


def test_control_flow_is_given_what_it_reads_from_outside() -> None:
    executor = Executor(ir.from_proto(_conditional("x")))
    x = torch.tensor([3.0])
    assert executor.run({"condition": torch.tensor(True), "x": x})["y"].tolist() == [1.0]
    assert executor.run({"condition": torch.tensor(False), "x": x})["y"].tolist() == [-3.0]


def test_control_flow_that_is_not_given_what_it_reads_is_an_error() -> None:
    model = ir.from_proto(_conditional("x"))
    with pytest.raises(UnsupportedModelError, match="reads 2 values and is given 1"):
        Executor(model).run_node(model.graph[0], [torch.tensor(True)])


def test_outputs_that_an_operator_does_not_give_are_refused() -> None:
    executor = _executor(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y, int64[1, 1, 2, 2] i)
        { [pool] y, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }
        """
    )
    with pytest.raises(UnsupportedModelError, match=r"node 'pool' \(MaxPool\) has 2 outputs; only 1"):
        executor.run({"x": torch.zeros(1, 1, 4, 4)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_floats_lie_there_and_shapes_on_the_cpu() -> None:
    model = ir.from_proto(parser.parse_model(BRANCHES))
    executor = Executor(model, device="cuda")
    assert executor.constants["w"].device.type == "cuda"
    assert executor.constants["shape"].device.type == "cpu"
    x = torch.randn(3, 4)
    result = executor.run({"x": x})["y"]
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), Executor(model).run({"x": x})["y"])
    resize = Executor(ir.from_proto(parser.parse_model(RESIZE)), device="cuda")
    assert resize.run({"x": torch.zeros(1, 2, 3, 4)})["y"].device.type == "cuda"
