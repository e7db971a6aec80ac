"""What a few bytes may ask of constant folding: typed errors, before or beside this process, in bounded time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import efrapq.graph.folding as folding
from efrapq.errors import LimitError, UnsupportedModelError
from efrapq.graph import simplify_child
from efrapq.graph.executor import Executor
from efrapq.graph.prepare import prepare, simplify
from efrapq.pipeline import defend

VAST = 1 << 40


def network(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """Conv(x) + k, where the nodes make k of the constants, or of r, the mean of all that Conv makes."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    held = [numpy_helper.from_array(np.asarray(a), n) for n, a in ({"w": weight} | constants).items()]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
            helper.make_node("ReduceMean", ["c"], ["r"], keepdims=0, name="mean"),
            *nodes,
            helper.make_node("Add", ["c", "k"], ["y"], name="add"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 8, 8])],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def reduced(op: str, inputs: list[str], **attributes: Any) -> list[onnx.NodeProto]:
    """A node that makes something vast, and its sum."""
    return [
        helper.make_node(op, inputs, ["big"], name="big", **attributes),
        helper.make_node("ReduceSum", ["big"], ["k"], keepdims=0, name="sum"),
    ]


def loop(trips: str) -> list[onnx.NodeProto]:
    """k, doubled so many times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Add", ["a", "a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]),
        ],
    )
    return [helper.make_node("Loop", [trips, "go", "one"], ["k"], name="loop", body=body)]


ONE = np.ones(1, np.float32)
SIZE = np.array([VAST], np.int64)
# Powers are not what shape inference computes.
HIDDEN = [
    helper.make_node("Pow", ["base", "exponent"], ["p"], name="power"),
    helper.make_node("Cast", ["p"], ["s"], to=TensorProto.INT64, name="cast"),
]
POWER = {"base": np.array([2.0], np.float32), "exponent": np.array([40.0], np.float32)}


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (reduced("ConstantOfShape", ["s"]), {"s": SIZE}),
        (reduced("Expand", ["one", "s"]), {"one": ONE, "s": SIZE}),
        (reduced("Tile", ["one", "s"]), {"one": ONE, "s": SIZE}),
        (
            reduced("Range", ["a", "b", "d"]),
            {"a": np.int64(0), "b": np.int64(VAST), "d": np.int64(1)},
        ),
    ],
    ids=["ConstantOfShape", "Expand", "Tile", "Range"],
)  # fmt: skip
def test_a_vast_constant_is_refused_by_name(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> None:
    if nodes[-2].op_type == "Range":
        nodes = [
            *nodes[:-1],
            helper.make_node("Cast", ["big"], ["f"], to=1),
            helper.make_node("ReduceSum", ["f"], ["k"], keepdims=0),
        ]
    with pytest.raises(LimitError, match=r"node big \(\w+\) makes a constant of 1,099,511,627,776 elements"):
        prepare(network(*nodes, **constants))


def test_two_constants_that_make_a_vast_one_are_seen() -> None:
    column = np.ones((1 << 15, 1), np.float32)
    with pytest.raises(LimitError, match="makes a constant of 1,073,741,824 elements"):
        prepare(network(*reduced("MatMul", ["a", "b"]), a=column, b=column.T.copy()))


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (HIDDEN, POWER),
        ([helper.make_node("Mul", ["h", "h"], ["s"], name="m")], {"h": np.array([1 << 20], np.int64)}),
    ],
    ids=["a power", "a product"],
)
def test_a_size_that_inference_does_not_see_ends_beside_this_process(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "MEMORY", 3 << 30)
    with pytest.raises(LimitError, match="takes more than 3 GiB to compute"):
        prepare(network(*nodes, *reduced("ConstantOfShape", ["s"]), **constants))


@pytest.mark.parametrize("count", [1 << 26, 1 << 20])
def test_a_range_of_many_numbers_is_counted_beside_this_process(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Range", ["a", "b", "d"], ["big"], name="big"),
        helper.make_node("Cast", ["big"], ["f"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("ReduceMax", ["f"], ["k"], keepdims=0, name="max"),
    ]
    apart = []
    monkeypatch.setattr(folding, "_apart", lambda proto: (apart.append(1), simplify_child.run_onnxsim(model))[1])
    model = network(helper.make_node("Identity", ["r"], ["k"], name="i"))
    prepare(network(*nodes, a=np.int64(0), b=np.int64(count), d=np.int64(1)))
    assert bool(apart) == (count > 1 << 20)


def test_a_loop_that_takes_too_long_ends_beside_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SECONDS", 3)
    started = time.monotonic()
    with pytest.raises(LimitError, match=r"takes more than 3 s to compute|makes [\d,]+ trips"):
        prepare(network(*HIDDEN, *loop("s"), **POWER, go=np.array(True), one=ONE))
    assert time.monotonic() - started < 30


def test_a_process_that_the_system_killed_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(LimitError, match="was killed, as systems do that run out of memory"):
        prepare(network(*HIDDEN, *loop("s"), **POWER, go=np.array(True), one=ONE))


def test_trips_that_were_computed_are_counted() -> None:
    nodes = [*HIDDEN, helper.make_node("Reshape", ["r", "shape"], ["one"], name="reshape"), *loop("s")]
    with pytest.raises(LimitError, match=r"node loop \(Loop\) makes 1,099,511,627,776 trips"):
        prepare(network(*nodes, **POWER, go=np.array(True), shape=np.array([1], np.int64)))


def test_a_vast_activation_is_refused_before_it_is_copied(images: Any) -> None:
    model = network(*reduced("Expand", ["r", "s"]), s=SIZE)
    with pytest.raises(LimitError, match=r"node 'big' \(Expand\) makes 1,099,511,627,776 elements"):
        Executor(simplify(model)).run({"x": torch.from_numpy(images(1))})


def test_what_stands_apart_is_the_same(monkeypatch: pytest.MonkeyPatch, images: Any, tmp_path: Path) -> None:
    model = network(
        helper.make_node("Add", ["one", "one"], ["k"], name="two"),
        one=np.linspace(0, 1, 256, dtype=np.float32).reshape(4, 8, 8),
    )
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    near = defend(path, calib={"x": images(8)}).data
    asked: list[int] = []
    honest = folding._apart
    monkeypatch.setattr(folding, "_is_bounded", lambda proto: False)
    monkeypatch.setattr(folding, "_apart", lambda proto: (asked.append(1), honest(proto))[1])
    assert defend(path, calib={"x": images(8)}).data == near
    assert asked


@pytest.mark.parametrize("apart", [False, True])
def test_what_onnxsim_says_is_passed_on(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A Reshape of 4 elements to 3: neither inference nor the checker computes the sum.
    model = network(
        helper.make_node("Mul", ["two", "one"], ["s"], name="m"),
        helper.make_node("Reshape", ["four", "s"], ["k"], name="wrong"),
        two=np.array([3], np.int64), one=np.array([1], np.int64), four=np.ones(4, np.float32),
    )  # fmt: skip
    if apart:
        monkeypatch.setattr(folding, "_is_bounded", lambda proto: False)
    with pytest.raises(UnsupportedModelError, match=r"onnxsim could not simplify the model|cannot be run"):
        Executor(prepare(model)).run({"x": torch.zeros(1, 3, 8, 8)})


def test_the_program_knows_nothing_of_efrapq() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print([m for m in sys.modules if m.startswith('efrapq')])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, simplify_child.__file__], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
