"""A torch network becomes a float ONNX graph at the door."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from efrapq.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

__all__ = ["export_module"]

# The lowest opset of torch's exporter.
EXPORT_OPSET = 18


def export_module(module: nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Export in evaluation mode with a dynamic batch, BatchNorm unfolded.

    input_shape: (C, H, W) of one sample, which has the type of the network's weights. Input and output are named
    `input` and `logits`. Raises UnsupportedModelError if torch.export cannot trace the network.
    """
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    modes = [(part, part.training) for part in module.modules()]
    device, dtype = _device_and_type(module)
    sample = torch.zeros(2, *input_shape, device=device, dtype=dtype)
    try:
        module.eval()
        with _quiet():
            program = torch.onnx.export(
                module,
                (sample,),
                dynamo=True,
                optimize=False,
                opset_version=EXPORT_OPSET,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                verbose=False,
            )
            if program is None:
                raise RuntimeError("torch.onnx.export returned nothing")
            optimizer.inline(program.model)
            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
            # Stack traces: the folders of this installation, in every node.
            ClearMetadataAndDocStringPass()(program.model)
            proto: onnx.ModelProto = program.model_proto
    except Exception as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise UnsupportedModelError(
            f"torch could not export this network to ONNX ({reason}); export it yourself with torch.onnx.export "
            "and pass the .onnx file"
        ) from exc
    finally:
        # Part by part: module.train() would also wake what the caller has frozen in evaluation mode.
        for part, training in modes:
            part.training = training
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    return proto


def _device_and_type(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the network's tensors are and what its real ones are; the CPU and float32 if it has none."""
    import torch

    held = list(itertools.chain(module.parameters(), module.buffers()))
    dtype = next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.float32)
    return held[0].device if held else torch.device("cpu"), dtype


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs about optional packages that it looks for; none of it is about the model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
