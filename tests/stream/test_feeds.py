"""The pass over named inputs is the pass over one input, and control flow reads what lies around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import parser

from efrapq.calibration.feeds import Feeds
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare
from efrapq.progress import Silent
from efrapq.stream import PassSettings, Solved, streaming_pass


def solve(proto: onnx.ModelProto, inputs: list[Any], **settings: Any) -> Solved:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    return streaming_pass(model, layers, place(model.graph, layers, 8), inputs, PassSettings(4, **settings), Silent())


def same(a: Solved, b: Solved) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        np.testing.assert_array_equal(weight.codes, b.weights[name].codes)
        np.testing.assert_array_equal(weight.scale, b.weights[name].scale)
    assert a.activations == b.activations
    assert [r.loss for r in a.reports] == [r.loss for r in b.reports]
    assert [r.rows for r in a.reports] == [r.rows for r in b.reports]


@pytest.mark.parametrize("rows", [1, 32])  # 1: of each output a seeded few positions, by the number of samples
def test_one_named_input_is_one_input(
    varied_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], rows: int
) -> None:
    chunks = [torch.from_numpy(c) for c in np.split(images(24), [10, 20])]
    named = [Feeds({"input": c}, len(c)) for c in chunks]
    same(solve(varied_net(), chunks, rows=rows), solve(varied_net(), named, rows=rows))


def test_integers_pass_as_they_are_and_are_never_kept_as_codes() -> None:
    rng = np.random.default_rng(0)
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        net (int32[N,T] ids, bool[N,T] keep, float[N,T,6] extra) => (float[N,T,3] y) {
            words = Gather (table, ids)
            axis = Constant <value_ints = [2]> ()
            keep3 = Unsqueeze (keep, axis)
            zero = Constant <value_float = 0.0> ()
            kept = Where (keep3, words, zero)
            both = Concat <axis=2> (kept, extra)
            h = MatMul (both, w1)
            r = Relu (h)
            y = MatMul (r, w2)
        }"""
    )
    table, w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4), (10, 8), (8, 3)))
    for name, array in (("table", table), ("w1", w1), ("w2", w2)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    ids = rng.integers(0, 9, (12, 5)).astype(np.int32)
    keep = rng.random((12, 5)) < 0.7
    extra = rng.standard_normal((12, 5, 6)).astype(np.float32)
    arrays = {"ids": ids, "keep": keep, "extra": extra}

    def feeds(*cuts: int) -> list[Feeds]:
        parts = {k: np.split(a, cuts) for k, a in arrays.items()}
        return [
            Feeds({k: torch.from_numpy(p[i]) for k, p in parts.items()}, len(parts["ids"][i]))
            for i in range(len(cuts) + 1)
        ]

    solved = solve(proto, feeds(5))
    assert solved.activations.keys().isdisjoint({"ids", "keep", "keep3"})
    # What the first layer reads and loses, by hand: both parts are rounded, and so is what they make together.
    kept = np.where(keep[..., None], table[ids], 0).astype(np.float32)
    joined = np.concatenate([kept, extra], 2)
    grids = solved.activations
    low, high = min(joined.min(), 0), max(joined.max(), 0)
    assert grids["both"].scale == pytest.approx((high - low) / 255, rel=1e-6)

    def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
        return grids[name].dequantize(grids[name].quantize(x))

    parts = [rounded(torch.from_numpy(a), name) for a, name in ((kept, "kept"), (extra, "extra"))]
    x_hat = rounded(torch.cat(parts, 2), "both").reshape(-1, 10).numpy().astype(np.float64)
    weight = next(w for w in solved.weights.values() if w.codes.shape == (10, 8))
    error = x_hat @ weight.dequantized() - joined.reshape(-1, 10).astype(np.float64) @ w1
    assert solved.reports[0].loss == pytest.approx(np.square(error).sum(1).mean(), rel=1e-4)
    same(solved, solve(proto, feeds(5), memory=0))


def test_a_branch_that_reads_a_value_from_around_it() -> None:
    rng = np.random.default_rng(1)
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        net (float[N,6] x, bool flip) => (float[N,3] y) {
            h = MatMul (x, w1)
            c = If (flip) <
                then_branch = yes () => (float[N,8] a) { a = Neg (h) },
                else_branch = no () => (float[N,8] b) { b = Abs (h) }
            >
            s = Add (c, h)
            y = MatMul (s, w2)
        }"""
    )
    w1, w2 = rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((8, 3)).astype(np.float32)
    for name, array in (("w1", w1), ("w2", w2)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    x = torch.from_numpy(rng.standard_normal((20, 6)).astype(np.float32))
    solved = {
        flip: solve(proto, [Feeds({"x": x, "flip": torch.tensor(flip)}, 20)], solver=None) for flip in (False, True)
    }
    # -h + h is 0 on every grid; |h| + h is not.
    assert solved[True].reports[1].loss == pytest.approx(0, abs=1e-9)
    assert solved[False].reports[1].loss > 1e-4
