"""Arithmetic, comparisons, matrix products and activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from efrapq.graph.ops_call import Call, Op, ints, normalized

__all__ = ["MATH_OPS"]


def _plain(function: Callable[..., Tensor]) -> Op:
    """An op that is exactly one torch function of its inputs."""

    def op(call: Call, *inputs: Tensor) -> Tensor:
        return function(*inputs)

    return op


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    """An op of any number of inputs, folded from the left."""

    def op(call: Call, *inputs: Tensor) -> Tensor:
        return functools.reduce(function, inputs)

    return op


# --- arithmetic -------------------------------------------------------------------------------------------


def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(call: Call, base: Tensor, exponent: Tensor) -> Tensor:
    # The result has the type of the base, whatever the exponent's.
    return torch.pow(base, exponent).to(base.dtype)


def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    # fmod=1 takes the sign of the dividend, as C does; fmod=0 that of the divisor, as Python does.
    return torch.fmod(a, b) if call.flag("fmod") else torch.remainder(a, b)


def _mean(call: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if call.opset < 11:
        return x.clamp(call.real("min", -math.inf), call.real("max", math.inf))
    if low is None and high is None:
        return x
    if x.device.type == "cpu":  # the scalar form is faster there; on a GPU reading the scalar would wait for it
        return x.clamp(None if low is None else low.item(), None if high is None else high.item())
    return x.clamp(low, high)


def _isinf(call: Call, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if call.flag("detect_positive", True):
        found |= torch.isposinf(x)
    if call.flag("detect_negative", True):
        found |= torch.isneginf(x)
    return found


def _cumsum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    dim = normalized(ints(axis)[0], x.dim())
    reverse = call.flag("reverse")
    if reverse:
        x = x.flip(dim)
    total = torch.cumsum(x, dim, dtype=x.dtype)
    if call.flag("exclusive"):
        total = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), total.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return total.flip(dim) if reverse else total


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha · A' B' + beta · C, C broadcast to the (M, N) of the product."""
    a = a.t() if call.flag("transA") else a
    b = b.t() if call.flag("transB") else b
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    if not a.is_floating_point():
        if not (alpha.is_integer() and beta.is_integer()):
            raise ValueError("fractional alpha or beta with integer matrices")
        alpha, beta = int(alpha), int(beta)
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    product = torch.mm(a, b)
    return product if alpha == 1 else product * alpha


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.required("equation").as_string(), *inputs)


# --- activations ------------------------------------------------------------------------------------------


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.real("alpha", 0.01))


def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.real("alpha", 1.0))


def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.real("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    alpha = call.real("alpha", 1.67326319217681884765625)
    return call.real("gamma", 1.05070102214813232421875) * F.elu(x, alpha)


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (x * call.real("alpha", 0.2) + call.real("beta", 0.5)).clamp(0, 1)


def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.real("alpha", 1.0), x, 0)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.text("approximate", "none"))


def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call.real("alpha", 1.0))


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Op:
    """Softmax along one axis; before opset 13 over all axes from the given one on, taken together."""

    def op(call: Call, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return function(x, call.integer("axis", -1))
        axis = call.integer("axis", 1)
        axis = axis if axis == x.dim() else normalized(axis, x.dim())
        return function(x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])), 1).reshape(x.shape)

    return op


MATH_OPS: dict[str, Op] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Ceil": _plain(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "CumSum": _cumsum,
    "Div": _div,
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "IsInf": _isinf,
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _matmul,
    "Max": _folded(torch.maximum),
    "Mean": _mean,
    "Min": _folded(torch.minimum),
    "Mish": _plain(F.mish),
    "Mod": _mod,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),  # half to even, as ONNX has it
    "Selu": _selu,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Sum": _folded(torch.add),
    "Swish": _swish,
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": _thresholded_relu,
    "Xor": _plain(torch.logical_xor),
}
