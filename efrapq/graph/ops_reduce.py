"""Reductions over some or all axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from efrapq.graph.ops_call import Call, Op, normalized

__all__ = ["REDUCE_OPS"]

_Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: _Reduce, *, input_since: int = 18) -> Op:
    """A reduction over `axes` (all of them where none are given), `axes` an input from opset `input_since` on."""

    def op(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = call.axes(given, input_since=input_since)
        if not axes:
            axes = () if call.flag("noop_with_empty_axes") else tuple(range(x.dim()))
        return function(x, tuple(normalized(axis, x.dim()) for axis in axes), call.flag("keepdims", True))

    return op


# An empty tuple of axes means "nothing to reduce" here, and "everything" to most of torch's reductions.


def _reduce_sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return x.sum(axes, keepdim=keepdims, dtype=x.dtype) if axes else x


def _reduce_mean(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    if not axes:
        return x
    if x.is_floating_point():
        return x.mean(axes, keepdim=keepdims)
    return torch.div(_reduce_sum(x, axes, keepdims), math.prod(x.shape[a] for a in axes), rounding_mode="trunc")


def _extremum(function: Callable[..., Tensor], *, highest: bool) -> _Reduce:
    def reduce(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        if not axes:
            return x
        if x.dtype == torch.bool:
            return torch.any(x, axes, keepdim=keepdims) if highest else torch.all(x, axes, keepdim=keepdims)
        if x.is_floating_point() and any(x.shape[axis] == 0 for axis in axes):
            # The extremum of nothing is the neutral element; torch declines it.
            return x.sum(axes, keepdim=keepdims).add(-math.inf if highest else math.inf)
        return function(x, axes, keepdim=keepdims)

    return reduce


def _reduce_prod(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdims, dtype=x.dtype)
    return x


def _reduce_l1(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return _reduce_sum(x.abs(), axes, keepdims)


def _reduce_l2(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    if not axes:
        return x.abs()
    # Unlike sqrt(sum(x²)), its gradient at the zero vector is 0 and not NaN.
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keepdims)
    return norm


def _reduce_sum_square(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return _reduce_sum(x * x, axes, keepdims)


def _reduce_log_sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return _reduce_sum(x, axes, keepdims).log()


def _reduce_log_sum_exp(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keepdims) if axes else x


def _arg_extremum(function: Callable[..., Tensor]) -> Op:
    def op(call: Call, x: Tensor) -> Tensor:
        axis, keepdims = normalized(call.integer("axis", 0), x.dim()), call.flag("keepdims", True)
        if not call.flag("select_last_index"):
            return function(x, dim=axis, keepdim=keepdims)
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keepdims)

    return op


REDUCE_OPS: dict[str, Op] = {
    "ArgMax": _arg_extremum(torch.argmax),
    "ArgMin": _arg_extremum(torch.argmin),
    "ReduceL1": _reduction(_reduce_l1),
    "ReduceL2": _reduction(_reduce_l2),
    "ReduceLogSum": _reduction(_reduce_log_sum),
    "ReduceLogSumExp": _reduction(_reduce_log_sum_exp),
    "ReduceMax": _reduction(_extremum(torch.amax, highest=True)),
    "ReduceMean": _reduction(_reduce_mean),
    "ReduceMin": _reduction(_extremum(torch.amin, highest=False)),
    "ReduceProd": _reduction(_reduce_prod),
    "ReduceSum": _reduction(_reduce_sum, input_since=13),
    "ReduceSumSquare": _reduction(_reduce_sum_square),
}
