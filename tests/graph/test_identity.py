"""Identity nodes go, names and numbers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from efrapq.graph.identity import drop_identities
from efrapq.graph.prepare import prepare

F32 = np.float32
X = np.random.default_rng(0).standard_normal((3, 4)).astype(F32)

GRAPHS = {
    # The graph, and how many Identity nodes are left.
    "between": ("net (float[N,4] x) => (float[N,4] y) { a = Relu (x)  b = Identity (a)  y = Neg (b) }", 0),
    "a chain": (
        "net (float[N,4] x) => (float[N,4] y) { a = Relu (x)  b = Identity (a)  c = Identity (b)  y = Neg (c) }",
        0,
    ),
    "of an input": ("net (float[N,4] x) => (float[N,4] y) { a = Identity (x)  y = Neg (a) }", 0),
    "of a constant": ("net (float[N,4] x) => (float[N,4] y) { a = Identity (w)  y = Add (x, a) }", 0),
    "in front of an output": (
        "net (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu (x)  y = Identity (a)  z = Neg (a) }",
        0,
    ),
    "one value, two outputs": (
        "net (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu (x)  y = Identity (a)  z = Identity (a) }",
        1,
    ),
    "an output that is another": (
        "net (float[N,4] x) => (float[N,4] a, float[N,4] y) { a = Relu (x)  y = Identity (a) }",
        1,
    ),
    "an output that is an input": (
        "net (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Identity (x)  z = Neg (x) }",
        1,
    ),
}


@pytest.mark.parametrize(("text", "left"), GRAPHS.values(), ids=GRAPHS.keys())
def test_names_and_numbers_stay(foreign: Any, run_ort: Any, text: str, left: int) -> None:
    proto: onnx.ModelProto = foreign(text, {"w": np.ones(4, F32)} if "w" in text else {})
    model = ir.from_proto(proto)
    drop_identities(model.graph)
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    assert Counter(node.op_type for node in result.graph.node)["Identity"] == left
    assert list(result.graph.input) == list(proto.graph.input)
    assert [value.name for value in result.graph.output] == [value.name for value in proto.graph.output]
    for found, expected in zip(run_ort(result, X), run_ort(proto, X), strict=True):
        assert np.array_equal(found, expected)


def test_branches_that_hand_on_one_value(foreign: Any, run_ort: Any) -> None:
    """Both of them give what was made outside: without its Identity a branch would give a value of another graph."""
    branches = (
        "<then_branch = t () => (float[N,4] u) {{ u = Identity (a) }}, else_branch = e () => (float[N,4] v) {{ {} }}>"
    )
    proto = foreign(
        "net (float[N,4] x) => (float[N,4] y) { a = Relu (x)  m = ReduceSum <keepdims=0> (x)  g = Greater (m, zero)\n"
        f"b = If (g) {branches.format('v = Identity (a)')}\n c = If (g) {branches.format('v = Neg (a)')}\n"
        "y = Add (b, c) }",
        {"zero": np.array(0, F32)},
    )
    result = ir.to_proto(prepare(proto))
    onnx.checker.check_model(result, full_check=True)
    for x in (X, -X, np.abs(X), -np.abs(X)):
        assert np.array_equal(run_ort(result, x)[0], run_ort(proto, x)[0])
