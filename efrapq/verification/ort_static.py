"""ONNX Runtime's own post-training quantizer, as a user would call it: the tool that wakes what is asleep."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["quantize_with_ort"]


def quantize_with_ort(
    proto: onnx.ModelProto, inputs: Sequence[NDArray[np.float32]] | Sequence[Mapping[str, NDArray[Any]]], bits: int
) -> bytes:
    """onnxruntime.quantization.quantize_static: per-channel int4 or int8 weights, uint8 activations, QDQ.

    proto: a float model with BatchNorm folded. inputs: calibration batches, (n, C, H, W) float32, or inputs by name.
    Everything that is not named here is the tool's default (min-max calibration, its own scales).
    """
    import onnx_ir as ir
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from efrapq.exporters.opset import to_opset
    from efrapq.exporters.qdq import INT4_OPSET, INT8_OPSET

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[NDArray[np.float32] | Mapping[str, NDArray[Any]]] = iter(inputs)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self._batches, None)
            if batch is None:
                return None
            return dict(batch) if isinstance(batch, Mapping) else {name: batch}

    model = to_opset(ir.from_proto(proto), INT4_OPSET if bits == 4 else INT8_OPSET)
    name = str(model.graph.inputs[0].name)
    with tempfile.TemporaryDirectory(prefix="efrapq-") as folder, _silenced():
        source, result = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        onnx.save(ir.to_proto(model), source)
        quantize_static(
            source,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt4 if bits == 4 else QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return result.read_bytes()


@contextmanager
def _silenced() -> Iterator[None]:
    """The tool warns through the root logger that the model was not preprocessed; ours was."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
