"""From a file or a torch module to the float ONNX graph that everything else works on."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from efrapq.data import Dataset, load_dataset
from efrapq.errors import DataError, UnknownArchitectureError, UnsupportedModelError, UsageError
from efrapq.io import (
    Checkpoint,
    FileTensor,
    Format,
    Limits,
    load_checkpoint,
    load_onnx,
    printable,
    read_source,
    require_finite,
)
from efrapq.preprocess import Preprocess, PreprocessOverride, layout_of

if TYPE_CHECKING:
    import onnx
    from torch import nn

__all__ = ["PREPROCESS_KEY", "FloatModel", "effective_preprocess", "image_input", "load", "open_for"]

# Where a model file keeps the preprocessing it was trained with (ONNX metadata_props, safetensors metadata).
PREPROCESS_KEY = "efrapq.preprocess"


@dataclass(frozen=True)
class FloatModel:
    """A float model from outside.

    proto: the ONNX graph as imported. name: for messages. sha256: of the file's bytes (empty for an nn.Module). size:
    of the file and its external data. architecture: the zoo's or the user's name for it. preprocess: as the file's
    metadata says, if it does. notes: what the user should know about how it was read. external: location → SHA-256
    of the files of external data. outside: the initializers that stay in these, by name (see `efrapq.io.external`);
    empty for all but large models.
    """

    proto: onnx.ModelProto
    name: str
    path: Path | None
    sha256: str
    size: int
    format: str
    architecture: str | None = None
    preprocess: Preprocess | None = None
    notes: tuple[str, ...] = field(default=())
    external: dict[str, str] = field(default_factory=dict)
    outside: dict[str, FileTensor] = field(default_factory=dict)

    @property
    def content_sha256(self) -> str:
        """One hash over the graph and all its weights."""
        h = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name, held in sorted(self.outside.items()):
            h.update(f"{len(name)}|{name}|{held.sha256}|".encode())
        return h.hexdigest()

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(N, C, H, W) of the images that the model takes, None where dynamic: see `image_input`."""
        return image_input(self.proto)


def image_input(proto: onnx.ModelProto) -> tuple[int | None, ...]:
    """(N, C, H, W) of the first input that is not an initializer, None where dynamic, also where the model takes its
    images as (N, H, W, C); of an input of another rank the dimensions; () if there is none.
    """
    constants = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in constants:
            dims = value.type.tensor_type.shape.dim
            found = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
            return found if layout_of(found) == "NCHW" else (found[0], found[3], found[1], found[2])
    return ()


def load(
    model: str | Path | nn.Module,
    *,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    trust_pickle: bool = False,
    limits: Limits | None = None,
) -> FloatModel:
    """Read a `.onnx`, `.pt` or `.safetensors` file, or take an nn.Module.

    arch: a zoo name, or `package.module:factory` for a network of the user's own. input_shape: (C, H, W), needed for
    an nn.Module or a factory. Raises InputError (see `efrapq.errors`) for whatever the file has wrong with it.
    """
    if not isinstance(model, str | Path):
        return _from_module(model, "nn.Module", input_shape)
    source = read_source(model, limits)
    if source.format is Format.ONNX:
        if arch is not None:
            raise UsageError(f"{source.name}: --arch names the network of a state_dict; an ONNX file brings its own")
        found = load_onnx(source, limits=limits)
        proto = found.model
        recorded, notes = _recorded_preprocess({p.key: p.value for p in proto.metadata_props})
        notes += _half_precision(proto)
        return FloatModel(
            proto=proto,
            name=source.name,
            path=source.path,
            sha256=source.sha256,
            size=len(source.data) + found.external_bytes,
            format=str(source.format),
            preprocess=recorded,
            notes=notes,
            external=found.external,
            outside=found.outside,
        )
    checkpoint = load_checkpoint(source, trust_pickle=trust_pickle, limits=limits)
    require_finite(checkpoint.tensors)
    module, name, shape, notes = _build(checkpoint, arch, input_shape, source.name)
    exported = _from_module(module, source.name, shape)
    recorded, unread = _recorded_preprocess(checkpoint.metadata)
    return FloatModel(
        proto=exported.proto,
        name=source.name,
        path=source.path,
        sha256=source.sha256,
        size=len(source.data),
        format=str(source.format),
        architecture=name,
        preprocess=recorded,
        notes=notes + exported.notes + unread,
    )


def open_for(path: str | Path, input_shape: tuple[int | None, ...], preprocess: Preprocess | None) -> Dataset:
    """Open a dataset as a model takes it: image files become grey for one input channel, and are resized to the
    preprocessing's size, or else to the model's own where it has one.
    """
    size = preprocess.size if preprocess is not None else None
    channels: Literal[1, 3] = 3
    if len(input_shape) == 4:
        _, model_channels, height, width = input_shape
        channels = 1 if model_channels == 1 else 3
        if size is None and height is not None and width is not None:
            size = (height, width)
    return load_dataset(path, size=size, channels=channels)


def effective_preprocess(
    given: Preprocess | PreprocessOverride | None, recorded: Preprocess | None
) -> tuple[Preprocess | None, bool]:
    """What the user said over what the model records, and whether mean and std are known from either."""
    if isinstance(given, PreprocessOverride):
        return given.over(recorded), given.says_colours or recorded is not None
    found = given or recorded
    return found, found is not None


def _recorded_preprocess(metadata: dict[str, str]) -> tuple[Preprocess | None, tuple[str, ...]]:
    """The preprocessing a file records, and a note where the record cannot be read."""
    if PREPROCESS_KEY not in metadata:
        return None, ()
    try:
        return Preprocess.from_json(metadata[PREPROCESS_KEY]), ()
    except DataError as exc:
        return None, (str(exc),)


def _half_precision(proto: onnx.ModelProto) -> tuple[str, ...]:
    """A note where a model computes in less than float32."""
    from efrapq.graph.widen import halves

    found = halves(proto)
    if not found:
        return ()
    note = f"the model holds {' and '.join(found)}: it is quantized from float32, which has all of their numbers"
    if any(value.type.tensor_type.elem_type == 16 for value in (*proto.graph.input, *proto.graph.output)):
        note += ", and what it takes and gives in bfloat16 is float32 in the quantized file"
    return (note,)


def _from_module(module: nn.Module, name: str, input_shape: tuple[int, int, int] | None) -> FloatModel:
    from efrapq.graph.from_torch import export_module

    if input_shape is None:
        raise UsageError(f"{name}: say what one input looks like, e.g. --input-shape 3,224,224")
    proto = export_module(module, input_shape)
    return FloatModel(
        proto=proto, name=name, path=None, sha256="", size=0, format="nn.Module", notes=_half_precision(proto)
    )


def _build(
    checkpoint: Checkpoint, arch: str | None, input_shape: tuple[int, int, int] | None, name: str
) -> tuple[nn.Module, str, tuple[int, int, int] | None, tuple[str, ...]]:
    """The checkpoint's network with its weights: (module, architecture name, input shape, notes)."""
    from efrapq.models import zoo

    if checkpoint.module is not None:
        return checkpoint.module, type(checkpoint.module).__name__, input_shape, ()
    if arch is not None and ":" in arch:
        return _from_factory(arch, checkpoint, name), arch, input_shape, ()
    match = zoo.recognize(checkpoint.tensors, name=arch)
    notes = (match.architecture.caveat,) if match.architecture.caveat and arch is None else ()
    return zoo.load(match), match.architecture.name, input_shape or match.input_shape, notes


def _from_factory(arch: str, checkpoint: Checkpoint, name: str) -> nn.Module:
    from torch import nn

    module_name, _, attribute = arch.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        network = factory()
    except Exception as exc:
        reason = (str(exc).splitlines() or [""])[0]
        raise UnknownArchitectureError(
            f"--arch {printable(arch)}: cannot be imported and called without arguments ({type(exc).__name__}: "
            f"{printable(reason)}); give package.module:factory with the module on the Python path"
        ) from exc
    if not isinstance(network, nn.Module):
        raise UsageError(f"--arch {printable(arch)}: returned a {type(network).__name__}, not an nn.Module")
    try:
        network.load_state_dict(checkpoint.tensors)
    except RuntimeError as exc:
        first = str(exc).splitlines()[1].strip() if "\n" in str(exc) else str(exc)
        raise UnsupportedModelError(f"{name}: does not fit the network of --arch {printable(arch)}: {first}") from exc
    return network
