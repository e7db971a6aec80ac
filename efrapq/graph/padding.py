"""auto_pad and output_shape of convolutions, written as numbers where the input's size need not be known for them.

TensorFlow and older exporters leave the padding to the runtime. The arithmetic is that of the ONNX specification of
Conv and ConvTranspose; where a stride makes it depend on a size that is dynamic, the node stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["explicit_padding"]


def explicit_padding(node: ir.Node) -> None:
    """Replace auto_pad and output_shape of a Conv or ConvTranspose by the pads that they stand for."""
    if node.op_type not in ("Conv", "ConvTranspose") or node.domain not in ("", "ai.onnx"):
        return
    attributes = node.attributes
    mode = attributes.get_string("auto_pad", "NOTSET")
    shape = attributes.get_ints("output_shape") if "output_shape" in attributes else None
    if mode == "NOTSET" and shape is None:
        return
    if mode == "VALID" and shape is None:
        attributes.pop("auto_pad")
        attributes.pop("pads", None)
        return
    kernel = _kernel(node)
    if kernel is None:
        return
    rank = len(kernel)
    strides = attributes.get_ints("strides", [1] * rank)
    dilations = attributes.get_ints("dilations", [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = _sizes(node, rank)
    if node.op_type == "Conv":
        totals = [_same(n, s, r) for n, s, r in zip(sizes, strides, reach, strict=True)]
        begin_gets_more = mode == "SAME_LOWER"
    else:
        extra = attributes.get_ints("output_padding", [0] * rank)
        wanted: Sequence[int | None] = [None] * rank if shape is None else shape[-rank:]
        totals = [_transposed(*a) for a in zip(sizes, strides, reach, extra, wanted, strict=True)]
        begin_gets_more = mode != "SAME_UPPER"
    known = [t for t in totals if t is not None]
    if len(known) < rank or min(known) < 0:
        return
    less, more = [t // 2 for t in known], [t - t // 2 for t in known]
    for name in ("auto_pad", "output_shape"):
        attributes.pop(name, None)
    attributes["pads"] = ir.AttrInt64s("pads", more + less if begin_gets_more else less + more)


def _kernel(node: ir.Node) -> list[int] | None:
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        return None
    kernel = [d if isinstance(d, int) else 0 for d in list(weight.shape)[2:]]
    return kernel if kernel and min(kernel) > 0 else None


def _sizes(node: ir.Node, rank: int) -> list[int | None]:
    """The input's spatial sizes, None where they are dynamic."""
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != rank + 2:
        return [None] * rank
    return [d if isinstance(d, int) else None for d in list(source.shape)[2:]]


def _same(size: int | None, stride: int, reach: int) -> int | None:
    """The total padding that makes a convolution's output ceil(size / stride)."""
    if stride == 1:
        return reach - 1
    if size is None:
        return None
    return max((-(-size // stride) - 1) * stride + reach - size, 0)


def _transposed(size: int | None, stride: int, reach: int, extra: int, wanted: int | None) -> int | None:
    """The total padding that makes a transposed convolution's output `wanted`, or stride · size where that is None."""
    if wanted is None:
        return reach + extra - stride
    return None if size is None else (size - 1) * stride + reach + extra - wanted
