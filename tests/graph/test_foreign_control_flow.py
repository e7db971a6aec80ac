"""Models with If, Loop and Scan: what is inside stays float, what is around is quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from efrapq.errors import LimitError
from efrapq.graph.executor import Executor, reads
from efrapq.graph.prepare import prepare

F32 = np.float32

BRANCHES = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    m = ReduceMean <keepdims=0> (x)
    g = Greater (m, zero)
    d = If (g) <
        then_branch = then () => (float[N,4,8,8] d1) { e = Conv <pads=[1,1,1,1]> (r, w2)  d1 = Relu (e) },
        else_branch = other () => (float[N,4,8,8] d2) { d2 = Sigmoid (r) }
    >
    p = GlobalAveragePool (d)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""
BRANCH_WEIGHTS: dict[str, Any] = {
    "w1": (4, 3, 3, 3),
    "b1": (4,),
    "zero": np.array(0, F32),
    "none": np.array(0),
    "w2": (4, 4, 3, 3),
    "fc": (5, 4),
    "fcb": (5,),
}

LOOP = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    m = ReduceMax <keepdims=0> (x)
    k = Cast <to=7> (m)
    z = Mul (k, none)
    t0 = Add (z, trips)
    d = Loop (t0, , r) <
        body = step (int64 i, bool go, float[N,4,8,8] s) => (bool still, float[N,4,8,8] t)
        { still = Identity (go)  u = Conv <pads=[1,1,1,1]> (s, w2)  v = Tanh (u)  t = Add (v, r) }
    >
    p = GlobalAveragePool (d)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""

SELF_CONTAINED = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    m = ReduceMax <keepdims=0> (x)
    k = Cast <to=7> (m)
    z = Mul (k, none)
    t0 = Add (z, trips)
    d = Loop (t0, , r) <
        body = step (int64 i, bool go, float[N,4,8,8] s) => (bool still, float[N,4,8,8] t)
        { still = Identity (go)  half = Constant <value_float = 0.5> ()  v = Mul (s, half)  t = Tanh (v) }
    >
    p = GlobalAveragePool (d)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""

NESTED = """
net (float[N,3,8,8] x, bool flag) => (float[N,3,8,8] y)
{
    r = Relu (x)
    y = If (flag) <
        then_branch = a () => (float[N,3,8,8] y1) {
            y1 = If (flag) <
                then_branch = b () => (float[N,3,8,8] y2) { y2 = Add (r, i0) },
                else_branch = c () => (float[N,3,8,8] y3) { y3 = Neg (r) }
            >
        },
        else_branch = d () => (float[N,3,8,8] y4) { y4 = Exp (x) }
    >
}
"""

SCAN = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    start = ReduceMean <axes=[0,1], keepdims=0> (r)
    last, all = Scan <num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
        body = step (float[8,8] s, float[N,8,8] t) => (float[8,8] s1, float[N,8,8] o)
        { m = ReduceMean <axes=[0], keepdims=0> (t)  s1 = Add (s, m)  o = Tanh (t) }
    > (start, r)
    a = Add (all, last)
    p = GlobalAveragePool (a)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""


def test_a_self_contained_loop_runs_in_onnx_runtime(foreign: Any, defended: Any, images: Any) -> None:
    result = defended(foreign(SELF_CONTAINED, BRANCH_WEIGHTS | {"trips": np.array(3)}), images(24))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    assert any("was run by ONNX Runtime" in note for note in result.notes)


def test_a_loop_of_a_known_number_of_trips_is_unrolled(foreign: Any, defended: Any, images: Any) -> None:
    result = defended(
        foreign(LOOP.replace("(t0, , r)", "(trips, , r)"), BRANCH_WEIGHTS | {"trips": np.array(2)}), images(24)
    )
    assert result.kinds == {"Conv": 3, "Gemm": 1}
    assert not any(node.op_type == "Loop" for node in result.proto.graph.node)


def test_a_scan_keeps_its_subgraph(foreign: Any, defended: Any, images: Any) -> None:
    result = defended(foreign(SCAN, BRANCH_WEIGHTS), images(24))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    assert any(node.op_type == "Scan" for node in result.proto.graph.node)


@pytest.mark.parametrize(("text", "kept"), [(BRANCHES, "If"), (LOOP, "Loop")], ids=["If", "Loop"])
def test_what_stands_in_a_subgraph_stays_float(foreign: Any, defended: Any, images: Any, text: str, kept: str) -> None:
    result = defended(foreign(text, BRANCH_WEIGHTS | {"trips": np.array(2)}), images(24))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    (inner,) = result.left_float.values()
    assert f"inside a subgraph of {kept}" in inner
    assert any(node.op_type == kept for node in result.proto.graph.node)


def test_reads_are_the_inputs_and_then_what_subgraphs_capture(foreign: Any) -> None:
    graph = ir.from_proto(foreign(NESTED, {"i0": np.ones(1, F32)})).graph
    relu, branch = graph
    assert [v.name for v in reads(relu) if v is not None] == ["x"]
    assert [v.name for v in reads(branch) if v is not None] == ["flag", "flag", "i0", "r", "x"]


@pytest.mark.parametrize("flag", [True, False])
def test_captured_values_reach_nested_subgraphs(foreign: Any, flag: bool) -> None:
    executor = Executor(ir.from_proto(foreign(NESTED, {"i0": np.ones(1, F32)})))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = executor.run({"x": x, "flag": torch.tensor(flag)})["y"]
    torch.testing.assert_close(y, x.relu() + 1 if flag else x.exp())


def test_a_condition_that_is_constant_leaves_one_branch(foreign: Any, defended: Any, images: Any) -> None:
    text = BRANCHES.replace("g = Greater (m, zero)", "g = Not (no)")
    result = defended(foreign(text, BRANCH_WEIGHTS | {"no": np.array(False)}), images(24))
    assert result.kinds == {"Conv": 2, "Gemm": 1}
    assert not any(node.op_type == "If" for node in result.proto.graph.node)


def test_a_relu_in_a_branch_is_no_part_of_the_layer_before_it(foreign: Any, defended: Any, images: Any) -> None:
    text = BRANCHES.replace("r = Relu (c)", "r = Identity (c)").replace("d2 = Sigmoid (r)", "d2 = Relu (m2)")
    text = text.replace("d1 = Relu (e)", "d1 = Sigmoid (e)").replace("(r, w2)", "(x3, w2)")
    text = text.replace("m = ReduceMean", "x3 = Concat <axis=1> (x, one) m2 = Identity (r) m = ReduceMean")
    one = np.zeros((24, 1, 8, 8), F32)
    text = text.replace("float[N,3,8,8] x", "float[24,3,8,8] x").replace("float[N,", "float[24,")
    result = defended(foreign(text, BRANCH_WEIGHTS | {"one": one}), images(24))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    onnx.checker.check_model(result.proto)


def test_a_loop_of_endless_trips_is_refused(foreign: Any) -> None:
    text = LOOP.replace("(t0, , r)", "(trips, , r)")
    with pytest.raises(LimitError, match="trips"):
        prepare(foreign(text, BRANCH_WEIGHTS | {"trips": np.array(2**63 - 1)}))


CONSTANT_CONDITION = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    d = If (yes) <
        then_branch = then () => (float[N,4,8,8] d1) {
            e = Neg (r)  m = ReduceMean <keepdims=0> (x)  g = Greater (m, zero)
            d1 = If (g) <
                then_branch = bright () => (float[N,4,8,8] d3) { d3 = Tanh (e) },
                else_branch = dark () => (float[N,4,8,8] d4) { d4 = Identity (e) }
            >
        },
        else_branch = other () => (float[N,4,8,8] d2) { d2 = Sigmoid (r) }
    >
    p = GlobalAveragePool (d)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""


def test_a_branch_that_the_simplifier_cannot_take_apart(foreign: Any, defended: Any, images: Any) -> None:
    """onnxsim would put the inner If ahead of what it reads. The If stays, and the layers around it are quantized."""
    proto = foreign(
        CONSTANT_CONDITION,
        {k: v for k, v in BRANCH_WEIGHTS.items() if k not in ("none", "w2")} | {"yes": np.array([True])},
    )
    result = defended(proto, images(48))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    assert result.left_float == {}
