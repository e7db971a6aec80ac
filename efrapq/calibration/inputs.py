"""Calibration inputs in chunks: from the user's images, or made from the model's BatchNorm statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from efrapq.data import Dataset, Preprocess
from efrapq.errors import DataError, UnsupportedModelError
from efrapq.loading import FloatModel
from efrapq.progress import Reporter

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = ["input_shape", "inputs_digest", "real_inputs", "synthetic_inputs"]


def input_shape(model: ir.Model, name: str) -> tuple[int | None, ...]:
    inputs = model.graph.inputs
    if len(inputs) != 1:
        raise UnsupportedModelError(f"{name}: has {len(inputs)} inputs; models with one image input are supported")
    shape = inputs[0].shape
    if shape is None or len(shape) != 4:
        raise UnsupportedModelError(f"{name}: its input is not a batch of images (N, C, H, W)")
    return tuple(d if isinstance(d, int) else None for d in shape)


def _chunk_size(shape: tuple[int | None, ...]) -> int:
    """Images a chunk: 128 at 32×32, fewer as they grow; a model with a fixed batch gets exactly that."""
    if shape[0] is not None:
        return shape[0]
    height, width = shape[2] or 224, shape[3] or 224
    return max(8, min(128, 128 * 32 * 32 // (height * width)))


def real_inputs(
    dataset: Dataset,
    shape: tuple[int | None, ...],
    preprocess: Preprocess | None,
    name: str,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    import torch

    preprocess = preprocess or Preprocess()
    chunks = []
    size = _chunk_size(shape)
    for indices in dataset.batches(size):
        x = dataset.inputs(indices, preprocess)
        if any(want is not None and want != got for want, got in zip(shape[1:], x.shape[1:], strict=True)):
            wanted = "×".join("any" if d is None else str(d) for d in shape[1:])
            raise DataError(f"{dataset.name}: gives inputs of {'×'.join(map(str, x.shape[1:]))}, {name} wants {wanted}")
        if shape[0] is None or len(x) == size:
            chunks.append(torch.from_numpy(x))
    if not chunks:
        raise DataError(f"{dataset.name}: fewer images than the model's fixed batch of {size}")
    count = sum(len(c) for c in chunks)
    return chunks, {"kind": "data", "source": Path(dataset.name).name, "images": count}


def synthetic_inputs(
    source: FloatModel,
    shape: tuple[int | None, ...],
    calib_size: int,
    device: str,
    seed: int,
    reporter: Reporter,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    import torch

    from efrapq.calibration.datafree import DataFree, synthesize
    from efrapq.graph.prepare import simplify

    channels, height, width = shape[1:]
    if channels is None or height is None or width is None:
        raise DataError(f"{source.name}: its input size is dynamic, so calibration inputs cannot be made: pass --calib")
    reporter.warn(
        "no --calib data: calibrating on inputs made from the model's BatchNorm statistics; real images are better"
    )
    batch = shape[0] or DataFree.batch
    settings = DataFree(images=max(min(calib_size, DataFree.images), batch), batch=batch, seed=seed)
    made = synthesize(simplify(source.proto), (channels, height, width), settings, device, reporter)
    chunks = list(torch.split(made, _chunk_size(shape)))
    if shape[0] is not None and len(chunks) > 1 and len(chunks[-1]) != shape[0]:
        chunks.pop()
    count = sum(len(c) for c in chunks)
    return chunks, {"kind": "batchnorm-statistics", "images": count, "steps": settings.steps}


def inputs_digest(chunks: list[torch.Tensor]) -> str:
    """SHA-256 over the inputs, however they are cut."""
    import hashlib

    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk.numpy().data)
    return h.hexdigest()
