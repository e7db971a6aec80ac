"""Convolution, pooling and normalization.

Tensors are (N, C, *spatial) with one to three spatial dimensions. What torch can do as it stands goes straight to
the torch function; asymmetric padding and the like take a detour through F.pad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from efrapq.graph.ops_call import Call, Op, normalized

__all__ = ["NEURAL_OPS"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class _Window:
    """A sliding window; every field has one entry for each spatial dimension. begin and end are the padding."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """How far one window extends, dilation included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def _window(call: Call, size: Sequence[int], kernel: Sequence[int]) -> _Window:
    """The window over an input of that spatial size, with the padding that the node states."""
    rank = len(size)
    if rank not in _CONV:
        raise ValueError(f"{rank} spatial dimensions; 1 to 3 are supported")
    ones = (1,) * rank
    pads = call.integers("pads")
    if pads is None or call.text("auto_pad", "NOTSET") == "VALID":
        pads = (0,) * (2 * rank)
    return _Window(
        kernel=tuple(kernel),
        strides=call.integers("strides") or ones,
        dilations=call.integers("dilations") or ones,
        begin=pads[:rank],
        end=pads[rank:],
    )


def _padded_window(call: Call, size: Sequence[int], kernel: Sequence[int]) -> _Window:
    """The window of a convolution or pooling: auto_pad=SAME_* makes the output ceil(size / stride)."""
    window = _window(call, size, kernel)
    auto_pad = call.text("auto_pad", "NOTSET")
    if not auto_pad.startswith("SAME"):
        return window
    totals = [
        max((math.ceil(n / s) - 1) * s + reach - n, 0)
        for n, s, reach in zip(size, window.strides, window.reach, strict=True)
    ]
    return _shared_out(window, totals, begin_gets_more=auto_pad == "SAME_LOWER")


def _shared_out(window: _Window, totals: Sequence[int], *, begin_gets_more: bool) -> _Window:
    """The window with each total padding halved between both ends."""
    less = tuple(total // 2 for total in totals)
    more = tuple(total - total // 2 for total in totals)
    begin, end = (more, less) if begin_gets_more else (less, more)
    return replace(window, begin=begin, end=end)


def _pad(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0) -> Tensor:
    """Constant padding of the spatial dimensions; negative amounts crop."""
    pairs = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return F.pad(x, pairs, value=value) if any(pairs) else x


# --- convolution ------------------------------------------------------------------------------------------


def _conv(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x (N, C, *spatial), w (M, C/group, *kernel), b (M,)."""
    window = _padded_window(call, x.shape[2:], w.shape[2:])
    padding = window.begin
    if window.begin != window.end:
        x, padding = _pad(x, window.begin, window.end), (0,) * len(padding)
    convolve = _CONV[len(padding)]
    return convolve(x, w, b, window.strides, padding, window.dilations, call.integer("group", 1))


def _conv_transpose(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x (N, C, *spatial), w (C, M/group, *kernel), b (M,)."""
    rank = x.dim() - 2
    size = tuple(x.shape[2:])
    window = _window(call, size, w.shape[2:])
    extra = call.integers("output_padding") or (0,) * rank

    auto_pad, shape = call.text("auto_pad", "NOTSET"), call.integers("output_shape")
    if shape is None and auto_pad.startswith("SAME"):
        shape = tuple(n * s for n, s in zip(size, window.strides, strict=True))
    if shape is not None:  # the padding is what makes the output that large
        full = [(n - 1) * s + reach for n, s, reach in zip(size, window.strides, window.reach, strict=True)]
        totals = [f + e - out for f, e, out in zip(full, extra, shape[-rank:], strict=True)]
        window = _shared_out(window, totals, begin_gets_more=auto_pad != "SAME_UPPER")

    transpose, group = _CONV_TRANSPOSE[rank], call.integer("group", 1)
    direct = window.begin == window.end and min(window.begin) >= 0
    if direct and all(e < max(s, d) for e, s, d in zip(extra, window.strides, window.dilations, strict=True)):
        return transpose(x, w, b, window.strides, window.begin, extra, group, window.dilations)
    y = transpose(x, w, None, window.strides, 0, 0, group, window.dilations)
    y = _pad(y, [-p for p in window.begin], [e - p for e, p in zip(extra, window.end, strict=True)])
    return y if b is None else y + b.reshape(-1, *(1,) * rank)


# --- pooling ----------------------------------------------------------------------------------------------


def _pooling_end(window: _Window, size: Sequence[int], *, ceil_mode: bool) -> tuple[int, ...]:
    """The end padding that makes plain pooling give ONNX's output size (windows that start past the input and
    its begin padding are dropped)."""
    end = []
    for n, b, e, s, reach in zip(size, window.begin, window.end, window.strides, window.reach, strict=True):
        span = n + b + e - reach
        count = (math.ceil(span / s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= n + b:
            count -= 1
        end.append((count - 1) * s + reach - n - b)
    return tuple(end)


def _torch_pools_alike(window: _Window) -> bool:
    return window.begin == window.end and all(2 * p <= k for p, k in zip(window.begin, window.kernel, strict=True))


def _max_pool(call: Call, x: Tensor) -> Tensor:
    window = _padded_window(call, x.shape[2:], call.required("kernel_shape").as_ints())
    pool, ceil_mode = _MAX_POOL[len(window.kernel)], call.flag("ceil_mode")
    if _torch_pools_alike(window):
        return pool(x, window.kernel, window.strides, window.begin, window.dilations, ceil_mode)
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    x = _pad(x, window.begin, _pooling_end(window, x.shape[2:], ceil_mode=ceil_mode), lowest)
    return pool(x, window.kernel, window.strides, 0, window.dilations)


def _average_pool(call: Call, x: Tensor) -> Tensor:
    size = x.shape[2:]
    window = _padded_window(call, size, call.required("kernel_shape").as_ints())
    ceil_mode, include_pad = call.flag("ceil_mode"), call.flag("count_include_pad")
    rank = len(window.kernel)
    if _torch_pools_alike(window) and set(window.dilations) == {1}:
        return _AVG_POOL[rank](x, window.kernel, window.strides, window.begin, ceil_mode, include_pad)

    # Sums over the windows, divided by the number of elements that count in each: two convolutions with ones.
    end = _pooling_end(window, size, ceil_mode=ceil_mode)
    beyond = [max(n - e, 0) for n, e in zip(end, window.end, strict=True)]
    counted = torch.ones((1, 1, *size), dtype=x.dtype, device=x.device)
    if include_pad:
        counted = _pad(counted, window.begin, [n - o for n, o in zip(end, beyond, strict=True)], 1)
        counted = _pad(counted, (0,) * rank, beyond)
    else:
        counted = _pad(counted, window.begin, end)
    ones = torch.ones((1, 1, *window.kernel), dtype=x.dtype, device=x.device)
    padded = _pad(x.reshape(-1, 1, *size), window.begin, end)
    sums, counts = (_CONV[rank](t, ones, None, window.strides, 0, window.dilations) for t in (padded, counted))
    return (sums / counts).reshape(*x.shape[:2], *sums.shape[2:])


def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


# --- normalization ----------------------------------------------------------------------------------------


def _batch_normalization(call: Call, x: Tensor, scale: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if call.flag("training_mode") or call.outputs > 1:
        raise ValueError("it is in training mode; export the model in evaluation mode")
    if call.opset < 9 and not call.flag("spatial", True):
        raise ValueError("statistics for each position (spatial=0) are not supported")
    return F.batch_norm(x, mean, var, scale, b, training=False, eps=call.real("epsilon", 1e-5))


def _instance_normalization(call: Call, x: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    # One channel a group. The function behind F.group_norm also takes planes of a single element.
    return torch.group_norm(x, x.shape[1], scale, b, call.real("epsilon", 1e-5))


def _group_normalization(call: Call, x: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    groups = call.required("num_groups").as_int()
    if call.opset < 21:  # scale and bias had one entry a group
        scale, b = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, b))
    return torch.group_norm(x, groups, scale, b, call.real("epsilon", 1e-5))


def _layer_normalization(call: Call, x: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
    axis = normalized(call.integer("axis", -1), x.dim())
    epsilon, shape = call.real("epsilon", 1e-5), tuple(x.shape[axis:])
    if scale.shape == shape and (b is None or b.shape == shape):
        y = F.layer_norm(x, shape, scale, b, epsilon)
    else:
        y = F.layer_norm(x, shape, eps=epsilon) * scale
        y = y if b is None else y + b
    if call.outputs == 1:
        return y
    axes = tuple(range(axis, x.dim()))
    var, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon)


def _rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(normalized(call.integer("axis", -1), x.dim()), x.dim()))
    mean_square = x.float().square().mean(axes, keepdim=True)
    return (x.float() * torch.rsqrt(mean_square + call.real("epsilon", 1e-5))).to(x.dtype) * scale


def _lrn(call: Call, x: Tensor) -> Tensor:
    """x / (bias + alpha/size · Σ x²)^beta, the sum over `size` neighbouring channels."""
    size = call.required("size").as_int()
    before = (size - 1) // 2
    squares = F.pad(x.square().flatten(2).transpose(1, 2), (before, size - 1 - before))
    sums = squares.unfold(2, size, 1).sum(3).transpose(1, 2).reshape(x.shape)
    return x / (call.real("bias", 1.0) + call.real("alpha", 1e-4) / size * sums) ** call.real("beta", 0.75)


NEURAL_OPS: dict[str, Op] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_normalization,
}
