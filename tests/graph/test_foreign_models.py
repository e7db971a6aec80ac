"""Models that nobody here wrote: how other exporters say things, defended end to end and run in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

F32 = np.float32
HEAD = "p = GlobalAveragePool (t)\n f = Flatten (p)\n y = Gemm <transB=1> (f, fc, fcb)"
HEAD_WEIGHTS: dict[str, Any] = {"fc": (5, 4), "fcb": (5,)}


def net(body: str, *, inputs: str = "float[N,3,8,8] x", outputs: str = "float[N,5] y", head: bool = True) -> str:
    """A graph around `body`, which makes t, (N, 4, H, W), out of x; the head makes y of it."""
    return f"net ({inputs}) => ({outputs})\n{{\n{body}\n{HEAD if head else ''}\n}}"


# Each: body, weights, quantized operators, reasons by node name for what stays float.
STEM = "c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n"
STEM_WEIGHTS: dict[str, Any] = {"w1": (4, 3, 3, 3), "b1": (4,)}
NEXT = "t = Conv <pads=[1,1,1,1]> (r, w2)"
NEXT_WEIGHTS: dict[str, Any] = {"w2": (4, 4, 3, 3)}

BODIES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # BatchNorm where it folds and where it does not.
    "batchnorm folds": (
        STEM + "n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)\n r = Relu (n)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4},
        {"Conv": 2, "Gemm": 1},
    ),
    "batchnorm of a Conv with two readers": (
        STEM + "n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)\n a = Add (n, c)\n r = Relu (a)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4},
        {"Conv": 2, "Gemm": 1},
    ),
    "two batchnorms of one Conv": (
        STEM
        + "n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)\n m = BatchNormalization (c, cn_s, cn_b, cn_m, cn_v)\n"
        + "a = Add (n, m)\n r = Relu (a)\n"
        + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4, "cn": 4},
        {"Conv": 2, "Gemm": 1},
    ),
    "batchnorm after Relu": (
        STEM + "q = Relu (c)\n r = BatchNormalization (q, bn_s, bn_b, bn_m, bn_v)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4},
        {"Conv": 2, "Gemm": 1},
    ),
    "batchnorm on the input": (
        "n = BatchNormalization (x, bn_s, bn_b, bn_m, bn_v)\nc = Conv <pads=[1,1,1,1]> (n, w1, b1)\n t = Relu (c)",
        STEM_WEIGHTS | {"bn": 3},
        {"Conv": 1, "Gemm": 1},
    ),
    "batchnorm after Concat": (
        STEM + "d = Conv (x, k1)\n j = Concat <axis=1> (c, d)\n"
        "n = BatchNormalization (j, bn_s, bn_b, bn_m, bn_v)\n r = Relu (n)\n t = Conv (r, k2)",
        STEM_WEIGHTS | {"k1": (2, 3, 1, 1), "k2": (4, 6, 1, 1), "bn": 6},
        {"Conv": 3, "Gemm": 1},
    ),
    "batchnorm after a pool": (
        STEM + "q = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)\n"
        "n = BatchNormalization (q, bn_s, bn_b, bn_m, bn_v)\n r = Relu (n)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4},
        {"Conv": 2, "Gemm": 1},
    ),
    "batchnorm written as Mul and Add": (
        STEM + "m = Mul (c, g)\n n = Add (m, h)\n r = Relu (n)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"g": (1, 4, 1, 1), "h": (1, 4, 1, 1)},
        {"Conv": 2, "Gemm": 1},
    ),
    # Weights that are not plain initializers.
    "weights behind Constant nodes": (
        "w = Constant <value = float[4,3,1,1] {1,0,-1, 2,1,0.5, 0.25,-0.5,1, 1,1,-1}> ()\n"
        "b = Constant <value_floats = [0.5, -0.5, 0.25, 0.0]> ()\n c = Conv (x, w, b)\n t = Relu (c)",
        {},
        {"Conv": 1, "Gemm": 1},
    ),
    "weights behind Identity": (
        "w = Identity (w1)\n v = Identity (w)\n c = Conv <pads=[1,1,1,1]> (x, v, b1)\n t = Relu (c)",
        STEM_WEIGHTS,
        {"Conv": 1, "Gemm": 1},
    ),
    "weights stored as float16": (
        "w = Cast <to=1> (w16)\n c = Conv <pads=[1,1,1,1]> (x, w, b1)\n t = Relu (c)",
        {"w16": np.linspace(-1, 1, 108, dtype=np.float16).reshape(4, 3, 3, 3), "b1": (4,)},
        {"Conv": 1, "Gemm": 1},
    ),
    "weights that are computed from constants": (
        "w = Mul (w1, g)\n c = Conv <pads=[1,1,1,1]> (x, w, b1)\n t = Relu (c)",
        STEM_WEIGHTS | {"g": (4, 1, 1, 1)},
        {"Conv": 1, "Gemm": 1},
    ),
    # One initializer with several readers.
    "one weight of two Convs": (
        STEM + "r = Relu (c)\n d = Conv <pads=[1,1,1,1]> (r, w2)\n s = Relu (d)\n t = Conv <pads=[1,1,1,1]> (s, w2)",
        STEM_WEIGHTS | NEXT_WEIGHTS,
        {"Conv": 3, "Gemm": 1},
    ),
    "one weight of two Convs and two batchnorms": (
        STEM + "r = Relu (c)\n d = Conv <pads=[1,1,1,1]> (r, w2)\n"
        "n = BatchNormalization (d, bn_s, bn_b, bn_m, bn_v)\n s = Relu (n)\n e = Conv <pads=[1,1,1,1]> (s, w2)\n"
        "m = BatchNormalization (e, cn_s, cn_b, cn_m, cn_v)\n t = Relu (m)",
        STEM_WEIGHTS | NEXT_WEIGHTS | {"bn": 4, "cn": 4},
        {"Conv": 3, "Gemm": 1},
    ),
    "a weight that is also added": (
        STEM + "r = Relu (c)\n d = Conv (r, k)\n e = Mul (d, k)\n t = Relu (e)",
        STEM_WEIGHTS | {"k": (1, 4, 1, 1)},
        {"Conv": 2, "Gemm": 1},
    ),
    "a bias shared and added": (
        "c = Conv <pads=[1,1,1,1]> (x, w1, b1)\n r = Relu (c)\n d = Conv <pads=[1,1,1,1]> (r, w2, b1)\n"
        "s = Reshape (b1, sh)\n t = Add (d, s)",
        STEM_WEIGHTS | NEXT_WEIGHTS | {"sh": np.array([1, 4, 1, 1])},
        {"Conv": 2, "Gemm": 1},
    ),
    # Activations.
    "PRelu": (
        STEM + "r = PRelu (c, slope)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"slope": (4, 1, 1)},
        {"Conv": 2, "Gemm": 1},
    ),
    "HardSwish": (STEM + "r = HardSwish (c)\n" + NEXT, STEM_WEIGHTS | NEXT_WEIGHTS, {"Conv": 2, "Gemm": 1}),
    "HardSigmoid": (
        STEM + "h = HardSigmoid <alpha=0.1666667, beta=0.5> (c)\n r = Mul (c, h)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS,
        {"Conv": 2, "Gemm": 1},
    ),
    "SiLU": (STEM + "h = Sigmoid (c)\n r = Mul (c, h)\n" + NEXT, STEM_WEIGHTS | NEXT_WEIGHTS, {"Conv": 2, "Gemm": 1}),
    "LeakyRelu": (STEM + "r = LeakyRelu <alpha=0.1> (c)\n" + NEXT, STEM_WEIGHTS | NEXT_WEIGHTS, {"Conv": 2, "Gemm": 1}),
    "Elu and Softplus": (
        STEM + "e = Elu (c)\n r = Softplus (e)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS,
        {"Conv": 2, "Gemm": 1},
    ),
    "Erf": (
        STEM + "v = Div (c, root)\n e = Erf (v)\n p1 = Add (e, one)\n m = Mul (c, p1)\n r = Mul (m, half)\n" + NEXT,
        STEM_WEIGHTS
        | NEXT_WEIGHTS
        | {"root": np.array(2**0.5, F32), "one": np.array(1, F32), "half": np.array(0.5, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "Clip with limits other than 0": (
        STEM + "r = Clip (c, low, high)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"low": np.array(-1, F32), "high": np.array(1, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "Clip without limits": (STEM + "r = Clip (c)\n" + NEXT, STEM_WEIGHTS | NEXT_WEIGHTS, {"Conv": 2, "Gemm": 1}),
    "Clip without a lower limit": (
        STEM + "r = Clip (c, , high)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"high": np.array(1, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    # Moving, resizing, joining.
    "Resize nearest": (
        STEM + 'r = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"> '
        "(c, , scales)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"scales": np.array([1, 1, 2, 2], F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "Resize linear to sizes": (
        STEM + "i = Shape (c)\n n = Slice (i, z, two)\n s = Concat <axis=0> (n, hw)\n"
        'r = Resize <mode="linear"> (c, , , s)\n' + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"z": np.array([0]), "two": np.array([2]), "hw": np.array([12, 10])},
        {"Conv": 2, "Gemm": 1},
    ),
    "Resize cubic": (
        STEM + 'r = Resize <mode="cubic", cubic_coeff_a=-0.5, coordinate_transformation_mode="align_corners"> '
        "(c, , scales)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"scales": np.array([1, 1, 1.5, 1.5], F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "Split and Concat": (
        STEM + "r = Relu (c)\n a, b = Split <axis=1> (r, parts)\n d = Conv <pads=[1,1,1,1]> (b, w2)\n"
        "t = Concat <axis=1> (a, d)",
        STEM_WEIGHTS | {"parts": np.array([1, 3]), "w2": (3, 3, 3, 3)},
        {"Conv": 2, "Gemm": 1},
    ),
    "channel shuffle": (
        STEM + "r = Relu (c)\n s = Reshape (r, s1)\n u = Transpose <perm=[0,2,1,3,4]> (s)\n v = Reshape (u, s2)\n"
        "t = Conv <pads=[1,1,1,1], group=2> (v, w2)",
        STEM_WEIGHTS | {"w2": (4, 2, 3, 3), "s1": np.array([0, 2, 2, 8, 8]), "s2": np.array([0, 4, 8, 8])},
        {"Conv": 2, "Gemm": 1},
    ),
    "Slice and Pad": (
        STEM + "r = Relu (c)\n s = Slice (r, starts, ends, axes, steps)\n q = Pad (s, pads)\n"
        't1 = Conv (q, w2)\n m = Pad <mode="reflect"> (t1, mpads)\n t = Relu (m)',
        STEM_WEIGHTS
        | NEXT_WEIGHTS
        | {
            "starts": np.array([0, 7]),
            "ends": np.array([6, -9]),
            "axes": np.array([2, 3]),
            "steps": np.array([1, -1]),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "mpads": np.array([0, 0, 2, 1, 0, 0, 1, 2]),
        },
        {"Conv": 2, "Gemm": 1},
    ),
    "Pad with a value": (
        STEM + "q = Pad (c, pads, value)\n r = Relu (q)\n t = Conv (r, w2)",
        STEM_WEIGHTS | NEXT_WEIGHTS | {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "value": np.array(0.5, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "DepthToSpace and SpaceToDepth": (
        STEM + "r = Relu (c)\n u = DepthToSpace <blocksize=2> (r)\n v = SpaceToDepth <blocksize=2> (u)\n"
        "t = Conv <pads=[1,1,1,1]> (v, w2)",
        STEM_WEIGHTS | NEXT_WEIGHTS,
        {"Conv": 2, "Gemm": 1},
    ),
    "squeeze and excitation": (
        STEM + "r = Relu (c)\n g = GlobalAveragePool (r)\n h = Conv (g, k1)\n i = Relu (h)\n j = Conv (i, k2)\n"
        "s = Sigmoid (j)\n t = Mul (r, s)",
        STEM_WEIGHTS | {"k1": (2, 4, 1, 1), "k2": (4, 2, 1, 1)},
        {"Conv": 3, "Gemm": 1},
    ),
    "pools": (
        STEM + "r = Relu (c)\n a = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (r)\n"
        "b = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[0,0,1,1], ceil_mode=1> (r)\n"
        "d = Add (a, b)\n e = LRN <size=3> (d)\n g = GlobalMaxPool (e)\n t = Add (d, g)",
        STEM_WEIGHTS,
        {"Conv": 1, "Gemm": 1},
    ),
    "MaxPool with indices": (
        STEM + "r = Relu (c)\n q, i = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r)\n t = Relu (q)",
        STEM_WEIGHTS,
        {"Conv": 1, "Gemm": 1},
    ),
    "gather, tile, where": (
        STEM + "r = Relu (c)\n g = Gather <axis=1> (r, idx)\n m = Greater (g, half)\n w = Where (m, g, c)\n"
        "v = Tile (w, reps)\n t = Relu (v)",
        STEM_WEIGHTS | {"idx": np.array([3, 1, -4, 0]), "half": np.array(0.3, F32), "reps": np.array([1, 1, 2, 1])},
        {"Conv": 1, "Gemm": 1},
    ),
    "residual with a scalar": (
        STEM + "r = Relu (c)\n d = Conv <pads=[1,1,1,1]> (r, w2)\n m = Mul (d, scale)\n a = Add (m, r)\n t = Relu (a)",
        STEM_WEIGHTS | NEXT_WEIGHTS | {"scale": np.array(0.3, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "instance and group normalization": (
        STEM + "n = InstanceNormalization (c, one, zero)\n r = Relu (n)\n" + NEXT,
        STEM_WEIGHTS | NEXT_WEIGHTS | {"one": np.ones(4, F32), "zero": np.zeros(4, F32)},
        {"Conv": 2, "Gemm": 1},
    ),
    "means and maxima": (
        STEM + "r = Relu (c)\n m = ReduceMean <axes=[2,3]> (r)\n x1 = ReduceMax <axes=[2,3]> (r)\n"
        "n = ReduceMean <axes=[1], keepdims=1> (r)\n a = Add (m, x1)\n t = Add (a, n)",
        STEM_WEIGHTS,
        {"Conv": 1, "Gemm": 1},
    ),
    "transposed and dilated": (
        STEM + "r = Relu (c)\n u = ConvTranspose <strides=[2,2], kernel_shape=[2,2]> (r, k, kb)\n s = Relu (u)\n"
        "t = Conv <dilations=[2,2], pads=[2,2,2,2]> (s, w2)",
        STEM_WEIGHTS | NEXT_WEIGHTS | {"k": (4, 4, 2, 2), "kb": (4,)},
        {"Conv": 2, "ConvTranspose": 1, "Gemm": 1},
    ),
}


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES.keys())
def test_bodies(foreign: Any, defended: Any, images: Any, case: Any) -> None:
    body, weights, kinds = case
    result = defended(foreign(net(body), weights | HEAD_WEIGHTS), images(24))
    if kinds is not None:
        assert result.kinds == kinds
        assert result.left_float == {}


# Matrix products: f is the flattened input, (N, 48), and the graph makes y of it.

MATRICES: dict[str, tuple[str, dict[str, Any], dict[str, int], dict[str, str]]] = {
    "Gemm": ("y = Gemm (f, w, b)", {"w": (48, 5), "b": (5,)}, {"Gemm": 1}, {}),
    "Gemm transB": ("y = Gemm <transB=1> (f, w, b)", {"w": (5, 48), "b": (5,)}, {"Gemm": 1}, {}),
    "Gemm without bias": ("y = Gemm <transB=1> (f, w)", {"w": (5, 48)}, {"Gemm": 1}, {}),
    "Gemm with alpha and beta": (
        "y = Gemm <transB=1, alpha=0.5, beta=2.0> (f, w, b)",
        {"w": (5, 48), "b": (5,)},
        {"Gemm": 1},
        {},
    ),
    "Gemm with beta 0": ("y = Gemm <beta=0.0> (f, w, b)", {"w": (48, 5), "b": (5,)}, {"Gemm": 1}, {}),
    "Gemm with a row as bias": ("y = Gemm (f, w, b)", {"w": (48, 5), "b": (1, 5)}, {"Gemm": 1}, {}),
    "Gemm with one number as bias": ("y = Gemm (f, w, b)", {"w": (48, 5), "b": np.array([0.3], F32)}, {"Gemm": 1}, {}),
    "Gemm with a bias that is computed": (
        "h = Gemm (f, v)\n m = ReduceMean <axes=[1], keepdims=1> (f)\n y = Gemm (h, w, m)",
        {"v": (48, 6), "w": (6, 5)},
        {"Gemm": 1},
        {"y": "bias is computed"},
    ),
    "Gemm with transA": (
        "h = Gemm (f, v)\n g = Transpose <perm=[1,0]> (h)\n y = Gemm <transA=1> (g, w, b)",
        {"v": (48, 6), "w": (6, 5), "b": (5,)},
        {"Gemm": 2},
        {},
    ),
    "MatMul": ("y = MatMul (f, w)", {"w": (48, 5)}, {"MatMul": 1}, {}),
    "MatMul and Add": ("m = MatMul (f, w)\n y = Add (m, b)", {"w": (48, 5), "b": (5,)}, {"Gemm": 1}, {}),
    "Add and MatMul": ("m = MatMul (f, w)\n y = Add (b, m)", {"w": (48, 5), "b": (5,)}, {"Gemm": 1}, {}),
    "a transposed constant": (
        "v = Transpose <perm=[1,0]> (w)\n y = MatMul (f, v)",
        {"w": (5, 48)},
        {"MatMul": 1},
        {},
    ),
    "a constant on the left": (
        "k = Gemm (f, v)\n g = Transpose <perm=[1,0]> (k)\n h = MatMul (w, g)\n y = Transpose <perm=[1,0]> (h)",
        {"v": (48, 6), "w": (5, 6)},
        {"Gemm": 1},
        {"h": "first operand"},
    ),
    "tokens": (
        "t = Reshape (x, s)\n h = MatMul (t, w)\n a = Add (h, b)\n r = Relu (a)\n o = MatMul (r, v)\n"
        "y = ReduceMean <axes=[1], keepdims=0> (o)",
        {"s": np.array([0, 3, 16]), "w": (16, 12), "b": (12,), "v": (12, 5)},
        {"Gemm": 1, "MatMul": 1},
        {},
    ),
    "a batch of constants": (
        "t = Reshape (x, s)\n h = MatMul (t, w)\n g = Reshape (h, s2)\n y = Gemm (g, v)",
        {"s": np.array([0, 3, 1, 16]), "w": (3, 16, 4), "s2": np.array([0, 12]), "v": (12, 5)},
        {"Gemm": 1},
        {"h": "3-dimensional"},
    ),
    "a vector": (
        "t = Reshape (x, s)\n h = MatMul (t, w)\n y = Gemm (h, v)",
        {"s": np.array([0, 3, 16]), "w": (16,), "v": (3, 5)},
        {"Gemm": 1},
        {"h": "1-dimensional"},
    ),
    "attention": (
        "t = Reshape (x, s)\n"
        "n = LayerNormalization <axis=-1> (t, g, gb)\n"
        "q = MatMul (n, wq)\n k = MatMul (n, wk)\n v = MatMul (n, wv)\n"
        "kt = Transpose <perm=[0,2,1]> (k)\n l = MatMul (q, kt)\n ls = Div (l, root)\n a = Softmax <axis=-1> (ls)\n"
        "o = MatMul (a, v)\n p = MatMul (o, wo)\n e = Add (t, p)\n m = ReduceMean <axes=[1], keepdims=0> (e)\n"
        "y = Gemm (m, w)",
        {
            "s": np.array([0, 6, 8]),
            "g": np.linspace(0.5, 1.5, 8, dtype=F32),
            "gb": (8,),
            "wq": (8, 8),
            "wk": (8, 8),
            "wv": (8, 8),
            "wo": (8, 8),
            "root": np.array(8**0.5, F32),
            "w": (8, 5),
        },
        {"MatMul": 4, "Gemm": 1},
        {"l": "computed at run time", "o": "computed at run time"},
    ),
    "attention by Einsum": (
        "t = Reshape (x, s)\n q = MatMul (t, wq)\n k = MatMul (t, wk)\n"
        'l = Einsum <equation="bqd,bkd->bqk"> (q, k)\n a = Softmax <axis=-1> (l)\n'
        'o = Einsum <equation="bqk,bkd->bqd"> (a, t)\n m = ReduceMean <axes=[1], keepdims=0> (o)\n y = Gemm (m, w)',
        {"s": np.array([0, 6, 8]), "wq": (8, 8), "wk": (8, 8), "w": (8, 5)},
        {"MatMul": 2, "Gemm": 1},
        {"l": "Einsum", "o": "Einsum"},
    ),
    "LSTM": (
        "t = Reshape (x, s)\n u = Transpose <perm=[1,0,2]> (t)\n"
        "o, h, c = LSTM <hidden_size=6> (u, wi, wr)\n g = Squeeze (h, zero)\n y = Gemm (g, w)",
        {
            "s": np.array([0, 6, 8]),
            "wi": (1, 24, 8),
            "wr": (1, 24, 6),
            "zero": np.array([0]),
            "w": (6, 5),
        },
        {"Gemm": 1},
        {"o": "recurrent"},
    ),
    "one-dimensional Conv": (
        "t = Reshape (x, s)\n c = Conv <pads=[1,1]> (t, k)\n r = Relu (c)\n g = Flatten (r)\n y = Gemm (g, w)",
        {"s": np.array([0, 3, 16]), "k": (4, 3, 3), "w": (64, 5)},
        {"Conv": 1, "Gemm": 1},
        {},
    ),
    "three-dimensional Conv": (
        "t = Reshape (x, s)\n c = Conv (t, k)\n r = Relu (c)\n g = Flatten (r)\n y = Gemm (g, w)",
        {"s": np.array([0, 1, 3, 4, 4]), "k": (2, 1, 2, 2, 2), "w": (36, 5)},
        {"Conv": 1, "Gemm": 1},
        {},
    ),
}


@pytest.mark.parametrize("case", MATRICES.values(), ids=MATRICES.keys())
def test_matrices(foreign: Any, defended: Any, images: Any, case: Any) -> None:
    body, weights, kinds, reasons = case
    text = f"net (float[N,3,4,4] x) => (float[N,5] y) {{ f = Flatten (x)\n {body} }}"
    proto = foreign(text, weights)
    for node in proto.graph.node:
        node.name = node.output[0]
    result = defended(proto, images(48, size=4))
    assert result.kinds == kinds
    assert result.left_float.keys() == reasons.keys()
    assert all(reasons[node] in reason for node, reason in result.left_float.items())
