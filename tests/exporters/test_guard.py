"""The output that says what was clipped: which values it watches, what it counts, and that nothing else changes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from efrapq.errors import UnsupportedModelError
from efrapq.exporters import PROFILES, export_model, read_quantized, remarks
from efrapq.exporters.guard import FLAT, GATED, GUARD_KEY, Guard, Watched, guard_of, plan_guard, strip_guard
from efrapq.graph.quantized import QuantizedModel

GUARDED = [name for name, profile in PROFILES.items() if profile.guards]


def guarded(quantized: QuantizedModel) -> QuantizedModel:
    return replace(quantized, metadata=quantized.metadata | {GUARD_KEY: plan_guard(quantized).to_json()})


def expected(plan: Guard, quantized: QuantizedModel, proto: onnx.ModelProto, run: Any, x: Any) -> np.ndarray:
    """How many ends of grids each sample arrives at, counted from the codes of a file whose codes are outputs."""
    names = {name: f"{name}.codes" for name in plan.watched}
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names.values())
    found = dict(zip(names, run(shown, x, optimized=False), strict=True))
    counts = np.zeros(len(x), np.int64)
    for name, watched in plan.watched.items():
        codes = found[name].reshape(len(x), -1)
        lowest = np.iinfo(codes.dtype).min
        counts += int(watched.high) * (codes == lowest + 255).any(1)
        counts += int(watched.low) * (codes == lowest).any(1)
    return counts


def test_all_targets_but_three_take_it() -> None:
    assert set(PROFILES) - set(GUARDED) == {"openvino", "qnn", "tensorrt"}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("target", GUARDED)
def test_it_counts_the_ends_that_codes_arrive_at_and_changes_no_answer(
    residual_net: Any, quantize: Any, images: Any, run_ort: Any, kernels: Any, target: str, bits: int
) -> None:
    x = images(16)
    q = quantize(residual_net(), x, bits=bits).quantized
    plain, proto = export_model(q, target), export_model(guarded(q), target)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.name for o in proto.graph.output] == [plain.graph.output[0].name, "clipped"]
    strange = np.concatenate([x[:4], 3 * x[4:8], -8 * x[8:12]])
    plan = plan_guard(q)
    for optimized in (False, True):
        answers, clipped = run_ort(proto, strange, optimized=optimized)
        assert np.array_equal(answers, run_ort(plain, strange, optimized=optimized)[0])
        assert (clipped.dtype, clipped.shape) == (np.int64, (12,))
        if not optimized:
            assert clipped.tolist() == expected(plan, q, plain, run_ort, strange).tolist()
    assert clipped.max() > clipped[:4].max()
    if target == "ort-arm":
        return  # whose integer kernels are those of another CPU
    # Whatever ran on integers still does.
    before, after = (Counter(kernels(p)) for p in (plain, proto))
    heavy = [op for op in before if "Conv" in op or "Gemm" in op or "Add" in op]
    assert [after[op] for op in heavy] == [before[op] for op in heavy]
    assert (after["QuantizeLinear"], after["DequantizeLinear"]) == (
        before["QuantizeLinear"],
        before["DequantizeLinear"],
    )


def test_calibration_images_arrive_at_ends_and_nearly_none_with_headroom(
    residual_net: Any, quantize: Any, images: Any, run_ort: Any
) -> None:
    x = images(64)
    counts = {}
    q = quantize(residual_net(), x).quantized
    wider = {name: replace(grid, scale=1.25 * grid.scale) for name, grid in q.activations.items()}
    for headroom, grids in ((1.0, q.activations), (1.25, wider)):
        q = replace(q, activations=grids)
        counts[headroom] = run_ort(export_model(guarded(q), "portable"), x, optimized=False)[1]
    assert counts[1.0].any()  # those that the ranges come from
    assert not counts[1.25].any()


@pytest.mark.parametrize("target", GUARDED)
def test_it_reads_back_and_is_written_again(varied_net: Any, quantize: Any, images: Any, target: str) -> None:
    q = guarded(quantize(varied_net(), images(12)).quantized)
    proto = export_model(q, target)
    back = read_quantized(proto)
    assert back.activations == q.activations
    assert back.digest == q.digest
    assert [o.name for o in back.model.graph.outputs] == [o.name for o in q.model.graph.outputs]
    for other in (target, "portable"):
        again = export_model(back, other).SerializeToString(deterministic=True)
        assert again == export_model(q, other).SerializeToString(deterministic=True)


@pytest.mark.parametrize("target", sorted(set(PROFILES) - set(GUARDED)))
def test_other_targets_are_written_without_it_and_that_is_said(
    residual_net: Any, quantize: Any, images: Any, target: str
) -> None:
    q = quantize(residual_net(), images(12)).quantized
    proto = export_model(guarded(q), target)
    assert len(proto.graph.output) == 1
    assert GUARD_KEY not in {p.key for p in proto.metadata_props}
    assert any("no guard" in remark for remark in remarks(guarded(q), target))
    assert not any("guard" in remark for remark in remarks(q, target))


def test_what_holds_an_output_named_clipped_keeps_it(net: Any, quantize: Any, images: Any, run_ort: Any) -> None:
    n = net()
    h = n.op("Relu", n.conv("input", "c1", 3, 4), "hidden")
    flat = n.op("Flatten", n.op("GlobalAveragePool", n.conv(h, "c2", 4, 4), "mean"), "flat")
    q = quantize(n.model(n.gemm(flat, "clipped", 4, 3)), images(8)).quantized
    proto = export_model(guarded(q), "portable")
    first, second = (o.name for o in proto.graph.output)
    assert first == "clipped"
    assert second != first
    assert guard_of({p.key: p.value for p in proto.metadata_props}).output == second  # type: ignore[union-attr]
    assert run_ort(proto, images(8))[1].shape == (8,)
    assert [o.name for o in read_quantized(proto).model.graph.outputs] == ["clipped"]


Chain = Callable[..., Mapping[str, Watched]]


@pytest.fixture
def plan(net: Any, quantize: Any, images: Any) -> Chain:
    """What is watched of a value behind a convolution and in front of another one. ops: between them."""

    def planned(ops: Sequence[tuple[str, dict[str, Any]]], scale: float = 1.0, **options: Any) -> Mapping[str, Watched]:
        n = net()
        value = n.conv("input", "c1", 3, 4)
        for place, (op, attributes) in enumerate(ops):
            others = [n.constant(f"k{place}_{i}", np.float32(v)) for i, v in enumerate(attributes.pop("limits", ()))]
            value = n.op(op, [value, *others], f"v{place}", **attributes)
        pooled = n.op("Flatten", n.op("GlobalAveragePool", n.conv(value, "c2", 4, 4), "mean"), "flat")
        q = quantize(n.model(n.gemm(pooled, "logits", 4, 3)), scale * images(16), **options).quantized
        return plan_guard(q).watched

    return planned


def test_values_of_either_sign_are_watched_at_both_ends(plan: Chain) -> None:
    watched = plan([])
    assert watched["c1"] == Watched(4, True, True)
    assert "input" not in watched  # a camera's values have an end of their own
    assert "flat" not in watched  # the codes of the mean


def test_a_relu_is_watched_where_it_is_open(plan: Chain) -> None:
    assert plan([("Relu", {})])["v0"] == Watched(4, False, True)


def test_a_clip_is_watched_where_its_grid_ends_before_it_does(plan: Chain) -> None:
    assert "v0" not in plan([("Clip", {"limits": (0, 0.01)})])
    assert plan([("Clip", {"limits": (0, 1e6)})])["v0"] == Watched(4, False, True)


def test_what_a_function_says_alike_of_is_not_watched(plan: Chain) -> None:
    # Of values from -100 to 100 the ends are the Sigmoid's; of small ones they are not.
    far = plan([("Sigmoid", {})], 300.0)
    assert "c1" not in far
    near = plan([("Sigmoid", {})], 0.1)
    assert near["c1"] == Watched(4, True, True)
    swish = plan([("HardSwish", {})], 300.0)
    assert swish["c1"] == Watched(4, False, True)


def times_gate(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * gate(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Elu": F.elu, "Erf": torch.erf, "Gelu": F.gelu, "HardSwish": F.hardswish, "Mish": F.mish, "Relu": F.relu,
    "Selu": F.selu, "Sigmoid": torch.sigmoid, "Softplus": F.softplus, "Tanh": torch.tanh,
}  # fmt: skip
GATES = {"HardSigmoid": times_gate(F.hardsigmoid), "Sigmoid": times_gate(torch.sigmoid)}


def test_functions_are_flat_where_the_guard_takes_them_to_be() -> None:
    assert set(FUNCTIONS) == set(FLAT)
    assert set(GATES) == set(GATED)
    for name, function, ends in [(n, FUNCTIONS[n], FLAT[n]) for n in FLAT] + [(n, GATES[n], GATED[n]) for n in GATED]:
        bounded = all(map(math.isfinite, ends))
        span = float(function(torch.tensor(50.0)) - function(torch.tensor(-50.0))) if bounded else 4.0
        for end, sign in zip(ends, (-1, 1), strict=True):
            if math.isfinite(end):
                beyond = function(end + sign * torch.linspace(0, 100, 10_001))
                assert float((beyond - beyond[0]).abs().max()) <= span / 255, name
                assert float((function(torch.tensor(end - sign * 1.0)) - beyond[0]).abs()) > 0, name


def test_a_network_in_which_nothing_can_be_clipped_is_refused(net: Any, quantize: Any, images: Any) -> None:
    n = net()
    pooled = n.op("Flatten", n.op("GlobalAveragePool", "input", "mean"), "flat")
    q = quantize(n.model(n.gemm(pooled, "logits", 3, 2)), images(8), act_bits=32).quantized
    with pytest.raises(UnsupportedModelError, match="nothing to watch"):
        plan_guard(q)


def test_values_whose_first_axis_counts_no_samples_are_refused(net: Any, quantize: Any, images: Any) -> None:
    n = net()
    h = n.op("Transpose", n.conv("input", "c1", 3, 4), "turned", perm=[1, 0, 2, 3])
    back = n.op("Transpose", n.op("AveragePool", h, "pooled", kernel_shape=[2, 2]), "back", perm=[1, 0, 2, 3])
    flat = n.op("Flatten", n.op("GlobalAveragePool", n.conv(back, "c2", 4, 4), "mean"), "flat")
    q = quantize(n.model(n.gemm(flat, "logits", 4, 3)), images(8)).quantized
    with pytest.raises(UnsupportedModelError, match="pooled does not hold one sample after the other"):
        plan_guard(q)


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{}", '{"output": "y", "watched": []}', '{"output": "y", "watched": {"a": [1]}}',
     '{"output": "y", "watched": {"a": ["4", true, true]}}', '{"output": "y", "watched": {"a": [99, true, true]}}',
     "[" * 100_000],
)  # fmt: skip
def test_a_record_that_is_none_of_ours_is_refused(record: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"efrapq\.guard record"):
        guard_of({GUARD_KEY: record})


def test_a_record_that_names_the_first_output_takes_nothing_away(residual_net: Any, quantize: Any, images: Any) -> None:
    proto = quantize(residual_net(), images(12)).export("portable")
    record = json.dumps({"output": proto.graph.output[0].name, "watched": {}})
    proto.metadata_props.add(key=GUARD_KEY, value=record)
    assert len(read_quantized(proto).model.graph.outputs) == 1


def test_stripping_leaves_the_file_without_a_guard(residual_net: Any, quantize: Any, images: Any) -> None:
    import onnx_ir as ir

    q = quantize(residual_net(), images(12)).quantized
    model = ir.from_proto(export_model(guarded(q), "ort-x86"))
    strip_guard(model)
    plain = export_model(q, "ort-x86")
    assert [n.op_type for n in ir.to_proto(model).graph.node] == [n.op_type for n in plain.graph.node]
    assert set(model.graph.initializers) == {t.name for t in plain.graph.initializer}
