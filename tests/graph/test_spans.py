"""Channels that may be scaled: where factors get through, and that what the network computes stays the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efrapq.errors import CorruptFileError
from efrapq.graph.equalize import Exponents, equalize, exponents_from_json, exponents_to_json
from efrapq.graph.executor import Executor
from efrapq.graph.layers import find_layers
from efrapq.graph.prepare import prepare
from efrapq.graph.spans import Span, find_spans

Foreign = Callable[..., onnx.ModelProto]

RESIDUAL = """
g (float[n, 3, 8, 8] x) => (float[n, 5] y) {
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu(a)
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (r, w2, b2)
  s = Add(c, r)
  t = Relu(s)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
  d = Conv <kernel_shape = [3, 3], group = 4> (p, w3)
  l = LeakyRelu <alpha = 0.1> (d)
  f = Flatten(l)
  y = Gemm <transB = 1> (f, w4, b4)
}"""
RESIDUAL_WEIGHTS = {
    "w1": (4, 3, 3, 3),
    "b1": (4,),
    "w2": (4, 2, 3, 3),
    "b2": (4,),
    "w3": (4, 1, 3, 3),
    "w4": (5, 16),
    "b4": (5,),
}


def spans_of(proto: onnx.ModelProto) -> tuple[ir.Model, list[Span]]:
    model = prepare(proto)
    return model, find_spans(model.graph, find_layers(model.graph)[0])


def outputs(model: ir.Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return next(iter(Executor(model).run({"x": torch.from_numpy(x)}).values())).numpy()


def test_spans_of_a_residual_network(foreign: Foreign) -> None:
    _, spans = spans_of(foreign(RESIDUAL, RESIDUAL_WEIGHTS))
    assert [set(span.values) for span in spans] == [{"a", "r", "c", "s", "t", "p"}, {"d", "l", "f"}]
    assert [(len(span.writers), len(span.readers)) for span in spans] == [(2, 2), (1, 1)]
    assert [span.channels for span in spans] == [4, 4]
    stream = spans[0]
    # What the first layer writes reaches both readers; what lies behind the Add, the second only.
    assert set(stream.after["r"]) == set(stream.readers)
    assert stream.after["p"] == stream.after["c"] == (stream.readers[1],)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_factors_leave_the_function_alone(foreign: Foreign, data: st.DataObject) -> None:
    proto = foreign(RESIDUAL, RESIDUAL_WEIGHTS)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    model, spans = spans_of(proto)
    before = outputs(model, x)
    steps = st.lists(st.integers(-24, 24), min_size=4, max_size=4)
    equalize(model, {span.name: np.array(data.draw(steps), np.int8) for span in spans})
    np.testing.assert_allclose(outputs(model, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Conv(x, w) b = Relu(a) y = Gemm <transB = 1> (b, v, c)", {"w": (4, 3), "v": (5, 4), "c": (5,)}),
        ("a = Gemm(x, w, b0) b = Relu(a) y = Gemm(b, v)", {"w": (3, 4), "b0": (1, 4), "v": (4, 5)}),
    ],
)
def test_matrices_with_and_without_transb(foreign: Foreign, body: str, weights: dict[str, tuple[int, ...]]) -> None:
    body = body.replace("Conv(x, w)", "Gemm <transB = 1> (x, w)")
    model, spans = spans_of(foreign(f"g (float[n, 3] x) => (float[n, 5] y) {{ {body} }}", weights))
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    before = outputs(model, x)
    assert [set(span.values) for span in spans] == [{"a", "b"}]
    equalize(model, {spans[0].name: np.array([-8, 3, 0, 17], np.int8)})
    np.testing.assert_allclose(outputs(model, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "between",
    [
        "b = Sigmoid(a)",
        "b = Add(a, k)",
        "b = Mul(a, a)",
        "b = Softmax <axis = 1> (a)",
        "m = GlobalAveragePool(a) b = Add(a, m)",
        "b = Concat <axis = 1> (a, a)",
    ],
)
def test_where_factors_do_not_get_through(foreign: Foreign, between: str) -> None:
    inputs = 8 if "Concat" in between else 4
    text = f"""g (float[n, 3, 8, 8] x) => (float[n, 5, 6, 6] y) {{
      a = Conv(x, w) {between} y = Conv(b, v) }}"""
    weights = {"w": (4, 3, 1, 1), "v": (5, inputs, 3, 3), "k": (1, 4, 8, 8)}
    assert spans_of(foreign(text, weights))[1] == []


def test_what_is_an_output_or_has_a_computed_bias_is_left_alone(foreign: Foreign) -> None:
    shown = """g (float[n, 3, 8, 8] x) => (float[n, 5, 8, 8] y, float[n, 4, 8, 8] b) {
      a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"""
    weights = {"w": (4, 3, 1, 1), "v": (5, 4, 1, 1)}
    assert spans_of(foreign(shown, weights))[1] == []
    computed = """g (float[n, 3] x, float[n, 4] k) => (float[n, 5] y) {
      a = Gemm(x, w, k) b = Relu(a) y = Gemm(b, v) }"""
    assert spans_of(foreign(computed, {"w": (3, 4), "v": (4, 5)}))[1] == []


def test_a_clip_limits_its_span(foreign: Foreign) -> None:
    text = """g (float[n, 3, 8, 8] x) => (float[n, 5, 8, 8] y) {
      a = Conv(x, w) b = Clip(a, zero, six) y = Conv(b, v) }"""
    zero, six = np.array(0, np.float32), np.array(6, np.float32)
    weights = {"w": (4, 3, 1, 1), "v": (5, 4, 1, 1), "zero": zero, "six": six}
    _, spans = spans_of(foreign(text, weights))
    assert [(set(span.values), span.limit) for span in spans] == [({"a", "b"}, 6.0)]
    assert spans_of(foreign(text, weights | {"zero": -six}))[1] == []


def test_the_record_is_read_as_it_was_written() -> None:
    held: Exponents = {"b": np.array([-128, 0, 127], np.int8), "a": np.array([1], np.int8)}
    text = exponents_to_json(held)
    assert text == exponents_to_json(dict(reversed(held.items())))
    read = exponents_from_json(text)
    assert sorted(read) == ["a", "b"]
    for name, steps in held.items():
        np.testing.assert_array_equal(read[name], steps)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 3}', '{"a": "?"}', '{"a": ["AA=="]}'])
def test_a_record_that_is_none(text: str) -> None:
    with pytest.raises(CorruptFileError, match="equalized"):
        exponents_from_json(text)


def test_a_record_of_another_model(foreign: Foreign) -> None:
    model, spans = spans_of(foreign(RESIDUAL, RESIDUAL_WEIGHTS))
    for record in ({"nobody": np.zeros(4, np.int8)}, {spans[0].name: np.zeros(3, np.int8)}):
        with pytest.raises(CorruptFileError, match="not of this float model"):
            equalize(model, record)
