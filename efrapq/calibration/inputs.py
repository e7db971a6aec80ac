"""Calibration inputs in chunks: images, arrays by input name, or made from the model's BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efrapq.calibration.arrays import Arrays, arrays_for, load_arrays
from efrapq.calibration.signature import ModelInput, layout_words, model_inputs, takes_images
from efrapq.data import Dataset
from efrapq.errors import DataError, UnsupportedModelError
from efrapq.io.text import printable
from efrapq.loading import FloatModel, open_for
from efrapq.preprocess import Preprocess, layout_of
from efrapq.progress import Reporter

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from efrapq.calibration.feeds import Feeds

__all__ = [
    "array_inputs",
    "input_shape",
    "inputs_digest",
    "open_calibration",
    "real_inputs",
    "synthetic_inputs",
]


def open_calibration(
    calib: str | Path | Dataset | Mapping[str, Any] | None,
    source: FloatModel,
    preprocess: Preprocess | None,
    count: int,
    seed: int,
) -> Dataset | Arrays | None:
    """What the user gave, as the model takes it: at most `count` samples. None is for models of images alone.

    Raises DataError for data that are none of the model's.
    """
    inputs = model_inputs(source.proto, source.name)
    if takes_images(inputs) and not isinstance(calib, Mapping):
        if calib is None:
            return None
        images = calib if isinstance(calib, Dataset) else open_for(calib, source.input_shape, preprocess)
        return images.subset(count, seed)
    return _arrays(calib, inputs, source.name).subset(count, seed)


def _arrays(calib: str | Path | Dataset | Mapping[str, Any] | None, inputs: Sequence[ModelInput], model: str) -> Arrays:
    if calib is None or isinstance(calib, Dataset):
        other = next((given for given in inputs if given.dtype == np.float64), None)
        if other is not None:
            raise UnsupportedModelError(
                f"{model}: its input '{printable(other.name)}' is {other.dtype}; networks in float32 are quantized: "
                "export the model in float32"
            )
        reason = "images do not fit this model" if calib is not None else "calibration inputs cannot be made for it"
        raise DataError(f"{model}: {reason}; pass --calib data.npz with one array per input, {layout_words(inputs)}")
    return arrays_for(calib, inputs) if isinstance(calib, Mapping) else load_arrays(calib, inputs)


def input_shape(model: ir.Model, name: str) -> tuple[int | None, ...]:
    """The dimensions of the input of a model of images in its own layout, None where dynamic."""
    inputs = model.graph.inputs
    if len(inputs) != 1:
        raise UnsupportedModelError(f"{name}: has {len(inputs)} inputs; models with one image input are supported")
    shape = inputs[0].shape
    if shape is None or len(shape) != 4:
        raise UnsupportedModelError(f"{name}: its input is not a batch of images (N, C, H, W) or (N, H, W, C)")
    return tuple(d if isinstance(d, int) else None for d in shape)


def _chunk_size(shape: tuple[int | None, ...]) -> int:
    """Images a chunk: 128 at 32×32, fewer as they grow; a model with a fixed batch gets exactly that."""
    if shape[0] is not None:
        return shape[0]
    _, height, width = _image_sizes(shape)
    height, width = height or 224, width or 224
    return max(8, min(128, 128 * 32 * 32 // (height * width)))


def _image_sizes(shape: tuple[int | None, ...]) -> tuple[int | None, int | None, int | None]:
    """(C, H, W) from the input's dimensions."""
    last_three = shape[1], shape[2], shape[3]
    return last_three if layout_of(shape) == "NCHW" else (shape[3], shape[1], shape[2])


def real_inputs(
    dataset: Dataset,
    shape: tuple[int | None, ...],
    preprocess: Preprocess | None,
    name: str,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    import torch

    preprocess = (preprocess or Preprocess()).in_layout(layout_of(shape))
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


def array_inputs(arrays: Arrays) -> tuple[list[Feeds], dict[str, Any]]:
    """The arrays in chunks, and a record of them: `inputs` has the shape that one run of the network takes by input
    name, with one sample where the batch is dynamic.
    """
    import torch

    from efrapq.calibration.feeds import Feeds

    chunks = []
    for chunk in arrays.chunks():
        tensors = {name: torch.from_numpy(array) for name, array in chunk.items()}
        chunks.append(Feeds(tensors, arrays.count(chunk)))
    record = {
        "kind": "arrays",
        "source": Path(arrays.name).name,
        "samples": sum(chunk.samples for chunk in chunks),
        "inputs": {name: list(array.shape) for name, array in arrays.sample().items()},
    }
    return chunks, record


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

    channels, height, width = _image_sizes(shape)
    if channels is None or height is None or width is None:
        raise DataError(f"{source.name}: its input size is dynamic, so calibration inputs cannot be made: pass --calib")
    reporter.warn(
        "no --calib data: calibrating on inputs made from the model's BatchNorm statistics; real images are better"
    )
    batch = shape[0] or DataFree.batch
    settings = DataFree(images=max(min(calib_size, DataFree.images), batch), batch=batch, seed=seed)
    image = (channels, height, width)
    made = synthesize(simplify(source.proto, source.outside), image, settings, device, reporter, layout_of(shape))
    chunks = list(torch.split(made, _chunk_size(shape)))
    if shape[0] is not None and len(chunks) > 1 and len(chunks[-1]) != shape[0]:
        chunks.pop()
    count = sum(len(c) for c in chunks)
    return chunks, {"kind": "batchnorm-statistics", "images": count, "steps": settings.steps}


def inputs_digest(chunks: Sequence[torch.Tensor] | Sequence[Feeds]) -> str:
    """SHA-256 over the inputs: images however they are cut, arrays with their names, types and cuts."""
    import hashlib

    import torch

    h = hashlib.sha256()
    for chunk in chunks:
        if isinstance(chunk, torch.Tensor):
            h.update(chunk.numpy().data)
            continue
        for name, tensor in sorted(chunk.tensors.items()):
            h.update(f"{len(name)}|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            h.update(tensor.numpy().tobytes())
    return h.hexdigest()
