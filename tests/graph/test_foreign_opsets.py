"""Every opset from 7 to 22, each with the forms its operators had then, and what an opset change may not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

F32 = np.float32
IR_VERSIONS = {
    7: 3,
    8: 3,
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
}


def written_for(opset: int) -> tuple[str, dict[str, Any]]:
    """A network in the words of one opset: Conv, BatchNorm, Clip, Pad, Slice, Split, upsampling, means, Softmax."""
    weights: dict[str, Any] = {
        "w1": (4, 3, 3, 3),
        "w2": (4, 4, 3, 3),
        "bn": 4,
        "fc": (5, 4),
        "fcb": (5,),
        "scales": np.array([1, 1, 2, 2], F32),
    }
    if opset < 11:
        weights["limits"] = None
        clip, pad = "r = Clip <min=0.0, max=2.0> (n)", "q = Pad <pads=[0,0,1,0,0,0,0,1]> (r)"
    else:
        clip, pad = "r = Clip (n, low, high)", "q = Pad (r, amounts)"
        weights |= {"low": np.array(0, F32), "high": np.array(2, F32), "amounts": np.array([0, 0, 1, 0, 0, 0, 0, 1])}
    weights.pop("limits", None)
    if opset < 10:
        cut = "s = Slice <axes=[2,3], starts=[0,1], ends=[8,9]> (q)"
    else:
        cut = "s = Slice (q, starts, ends, axes)"
        weights |= {"starts": np.array([0, 1]), "ends": np.array([8, 9]), "axes": np.array([2, 3])}
    if opset < 13:
        split = "a, b = Split <axis=1, split=[2,2]> (s)"
        squeeze = "f = Squeeze <axes=[2,3]> (m)"
    else:
        split = "a, b = Split <axis=1> (s, parts)"
        squeeze = "f = Squeeze (m, axes23)"
        weights |= {"parts": np.array([2, 2]), "axes23": np.array([2, 3])}
    if opset < 9:
        up = 'u = Upsample <mode="nearest", scales=[1.0,1.0,2.0,2.0]> (j)'
        del weights["scales"]
    elif opset < 10:
        up = 'u = Upsample <mode="nearest"> (j, scales)'
    elif opset == 10:
        up = 'u = Resize <mode="nearest"> (j, scales)'
    else:
        up = "u = Resize (j, roi, scales)"
        weights["roi"] = np.zeros(0, F32)
    if opset < 18:
        mean = "m = ReduceMean <axes=[2,3], keepdims=1> (k)"
    else:
        mean = "m = ReduceMean <keepdims=1> (k, meanaxes)"
        weights["meanaxes"] = np.array([2, 3])
    dropout = "d = Dropout <ratio=0.5> (f)" if opset < 12 else "d = Dropout (f)"
    body = "\n".join(
        [
            "c = Conv <pads=[1,1,1,1]> (x, w1)",
            "n = BatchNormalization <epsilon=0.001> (c, bn_s, bn_b, bn_m, bn_v)",
            clip, pad, cut, split,
            "j = Concat <axis=1> (b, a)",
            up,
            "e = Conv <pads=[1,1,1,1], strides=[2,2]> (u, w2)",
            "k = Relu (e)",
            mean, squeeze, dropout,
            "l = Gemm <transB=1> (d, fc, fcb)",
            "y = Softmax <axis=1> (l)",
        ]
    )  # fmt: skip
    return f"net (float[N,3,8,8] x) => (float[N,5] y) {{ {body} }}", weights


@pytest.mark.parametrize(("opset", "bits"), [*((opset, 8) for opset in IR_VERSIONS), (7, 4), (13, 4), (18, 4), (22, 4)])
def test_every_opset(foreign: Any, defended: Any, images: Any, opset: int, bits: int) -> None:
    text, weights = written_for(opset)
    proto = foreign(text, weights, opset=opset, ir_version=IR_VERSIONS[opset])
    if IR_VERSIONS[opset] < 4:  # initializers had to be inputs too
        for tensor in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    result = defended(proto, images(24), bits=bits, floor=22 if bits == 8 else 8)
    assert result.kinds == {"Conv": 2, "Gemm": 1}
    assert result.left_float == {}
    (opset_import,) = [o for o in result.proto.opset_import if o.domain == ""]
    assert opset_import.version == (21 if bits == 4 else 17)


# Operators whose meaning a conversion has to carry over, not only their name: opset, body that makes t of r, weights.
# Two bit widths, because 8-bit files are written at opset 17 and 4-bit ones at 21.

CHANGED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "Softmax over all axes": (11, "t = Softmax <axis=1> (r)", {}),
    "LogSoftmax over all axes": (11, "l = LogSoftmax <axis=2> (r)\n t = Mul (l, r)", {}),
    "Hardmax over all axes": (11, "h = Hardmax <axis=1> (r)\n t = Add (h, r)", {}),
    "BatchNormalization that says spatial": (
        8,
        "t = BatchNormalization <spatial=1, momentum=0.9> (r, bn_s, bn_b, bn_m, bn_v)",
        {"bn": 4},
    ),
    "linear Upsample": (9, 't = Upsample <mode="linear"> (r, scales)', {"scales": np.array([1, 1, 2, 2], F32)}),
    "linear Resize of opset 10": (
        10,
        't = Resize <mode="linear"> (r, scales)',
        {"scales": np.array([1, 1, 2, 2], F32)},
    ),
    "shrinking Resize of opset 10": (10, "t = Resize (r, scales)", {"scales": np.array([1, 1, 0.6, 0.6], F32)}),
    "AveragePool that counts its padding": (
        7,
        "t = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (r)",
        {},
    ),
    "PRelu of opset 7": (7, "t = PRelu (r, slope)", {"slope": (4, 1, 1)}),
    "Pad with a value as attribute": (10, 't = Pad <mode="constant", value=0.5, pads=[0,0,1,1,0,0,1,1]> (r)', {}),
    "Unsqueeze and Squeeze by attribute": (
        11,
        "u = Unsqueeze <axes=[2]> (r)\n v = ReduceSum <axes=[-1], keepdims=1> (u)\n t = Squeeze <axes=[2]> (v)",
        {},
    ),
    "ReduceSum of opset 12": (12, "v = ReduceSum <axes=[1], keepdims=1> (r)\n t = Add (v, r)", {}),
    "TopK of opset 9": (9, "v, i = TopK <axis=3, k=3> (r)\n t = Relu (v)", {}),
    "Split into equal parts": (13, "a, b = Split <axis=1> (r)\n t = Concat <axis=1> (b, a)", {}),
    "RoiAlign of opset 13": (
        13,
        "q = RoiAlign <output_height=4, output_width=4, sampling_ratio=2, spatial_scale=0.5> (r, rois, batch)\n"
        "m = ReduceMean <axes=[0], keepdims=1> (q)\n g = GlobalAveragePool (r)\n t = Mul (m, g)",
        {"rois": np.array([[0, 0, 12, 12], [2, 4, 14, 15]], F32), "batch": np.array([0, 0])},
    ),
    "GridSample of opset 16": (
        16,
        "n = Shape <start=0, end=1> (r)\n s = Concat <axis=0> (n, rest)\n e = Expand (grid, s)\n"
        't = GridSample <mode="bilinear", padding_mode="border"> (r, e)',
        {"grid": np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 2)).astype(F32), "rest": np.array([8, 8, 2])},
    ),
    "GridSample of opset 20": (
        20,
        "n = Shape <start=0, end=1> (r)\n s = Concat <axis=0> (n, rest)\n e = Expand (grid, s)\n"
        't = GridSample <mode="linear"> (r, e)',
        {"grid": np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 2)).astype(F32), "rest": np.array([8, 8, 2])},
    ),
    "GroupNormalization of opset 21": (
        21,
        "t = GroupNormalization <num_groups=2> (r, gs, gb)",
        {"gs": np.array([0.5, 1.5, 1.0, -1.0], F32), "gb": np.array([0.1, -0.2, 0.3, 0.0], F32)},
    ),
    "Pad that wraps": (19, 't = Pad <mode="wrap"> (r, pads)', {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "Resize about the centre": (
        19,
        't = Resize <mode="linear", coordinate_transformation_mode="half_pixel_symmetric"> (r, , scales)',
        {"scales": np.array([1, 1, 1.3, 1.3], F32)},
    ),
    "Scatter of the larger": (
        18,
        "g = GlobalAveragePool (r)\n n = Shape <start=0, end=1> (r)\n s = Concat <axis=0> (n, rest)\n"
        "i = Expand (places, s)\n u = Expand (g, s)\n"
        't = ScatterElements <axis=3, reduction="max"> (r, i, u)',
        {"rest": np.array([4, 8, 2]), "places": np.array([1, 5])},
    ),
    "ReduceMax with axes as input": (18, "m = ReduceMax (r, axes)\n t = Sub (r, m)", {"axes": np.array([1])}),
    "AveragePool that dilates": (19, "t = AveragePool <kernel_shape=[2,2], dilations=[2,2]> (r)", {}),
    "LayerNormalization of opset 17": (
        17,
        "t = LayerNormalization <axis=-1> (r, ls)",
        {"ls": np.linspace(0.5, 1.5, 8, dtype=F32)},
    ),
    "Gelu of opset 20": (20, 'g = Gelu (r)\n t = Gelu <approximate="tanh"> (g)', {}),
    "Mish of opset 18": (18, "t = Mish (r)", {}),
}


@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name, (opset, *_) in CHANGED.items() for bits in ((8,) if opset < 13 else (8, 4))],
)
def test_a_change_of_opset_keeps_the_meaning(foreign: Any, defended: Any, images: Any, name: str, bits: int) -> None:
    opset, body, weights = CHANGED[name]
    text = f"""
    net (float[N,3,8,8] x) => (float[N,5] y, float[N,4,H2,W2] t)
    {{
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)
        r = Relu (c)
        {body}
        p = GlobalAveragePool (t)
        f = Flatten (p)
        y = Gemm <transB=1> (f, fc, fcb)
    }}
    """
    base = {"w1": (4, 3, 3, 3), "b1": (4,), "fc": (5, 4), "fcb": (5,)}
    proto = foreign(text, base | weights, opset=opset, ir_version=max(IR_VERSIONS[opset], 4))
    # The first and the last layer, which are all there are, have 8 bits unless told otherwise.
    result = defended(proto, images(24), bits=bits, edge_bits=bits, floor=20 if bits == 8 else 6, act_bits=8)
    assert result.kinds == {"Conv": 1, "Gemm": 1}
