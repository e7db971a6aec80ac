"""Weights from .pt and .safetensors files, without running what is in them."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from efrapq.errors import (
    CorruptFileError,
    EfrapqError,
    LimitError,
    UnsafeFileError,
    UnsupportedFileError,
    UnsupportedModelError,
)
from efrapq.io.limits import Limits
from efrapq.io.pickles import unsafe_globals
from efrapq.io.sniff import Format
from efrapq.io.source import Source
from efrapq.io.tensors import plain_tensors
from efrapq.io.text import listing, printable
from efrapq.io.zipcheck import check_zip

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "load_checkpoint"]

_SAVE = "torch.save(model.state_dict(), 'model.pt')"
# Where training scripts put the state_dict when they save more than it.
_WRAPPER_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
)
# What DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model."""

    tensors: dict[str, torch.Tensor]
    """Names to tensors: on the CPU, contiguous, detached, of the dtype they were saved with."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The metadata of a safetensors header; empty for a .pt file."""
    module: torch.nn.Module | None = None
    """The whole model, where a trusted pickle held one."""


def load_checkpoint(source: Source, *, trust_pickle: bool = False, limits: Limits | None = None) -> Checkpoint:
    """Return the weights in a torch checkpoint or a safetensors file.

    A checkpoint may be a state_dict or a dict that holds one under a usual name ("state_dict", "model", …). A
    prefix that all names share because of DataParallel or torch.compile is dropped. With `trust_pickle` the file
    may run any code it likes, and may hold a whole nn.Module.

    Raises UnsafeFileError for a pickle that imports more than tensors, CorruptFileError for damage, LimitError for
    what would not fit in memory, UnsupportedModelError if there is no state_dict or more than one, or a tensor of a
    kind that cannot be quantized, AlreadyQuantizedError for quantized tensors, UnsupportedFileError for other files.
    """
    limits = limits or Limits()
    if source.format is Format.SAFETENSORS:
        return _load_safetensors(source, limits)
    if source.format is not Format.TORCH_ZIP:
        raise UnsupportedFileError(
            f"{source.name}: an {source.format} file, not a checkpoint; give .pt or .safetensors"
        )
    _check_torch_zip(source, trust_pickle, limits)
    content = _unpickle(source, trust_pickle)
    found = _find_state_dict(content, source.name)
    module = _unwrap(found) if _is_module(found) else None
    state = dict(_tensors_of(found if module is None else module, source.name))
    tensors = plain_tensors(state, source.name, len(source.data), limits)
    return Checkpoint(tensors if module is not None else _without_prefix(tensors), module=module)


def _check_torch_zip(source: Source, trust_pickle: bool, limits: Limits) -> None:
    from zipfile import ZipFile

    for member in check_zip(source.data, source.name, limits):
        if not member.filename.endswith("/data.pkl"):
            continue
        if member.file_size > limits.max_header_bytes:
            raise LimitError(
                f"{source.name}: a pickle of {member.file_size:,} bytes, over the limit of "
                f"{limits.max_header_bytes:,}; save only the state_dict: {_SAVE}"
            )
        if not trust_pickle:
            with ZipFile(BytesIO(source.data)) as archive:
                refused = unsafe_globals(archive.read(member.filename), source.name)
            if refused:
                raise UnsafeFileError(_unsafe(source.name, f"imports {listing(refused)}"))


def _unsafe(name: str, what: str) -> str:
    return (
        f"{name}: the pickle {what}, which can run code when it is loaded; save the state_dict ({_SAVE}) and give "
        f"that, or pass --trust-pickle if you trust its maker"
    )


def _unpickle(source: Source, trust_pickle: bool) -> object:
    import torch

    try:
        # What torch has to say about old files is of no use to the user, and a file must not choose what is printed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(BytesIO(source.data), weights_only=not trust_pickle, map_location="cpu")
    except EfrapqError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(_unsafe(source.name, f"is refused by torch ({_gist(error)})")) from None
    except MemoryError:
        raise LimitError(f"{source.name}: the checkpoint does not fit in memory; use a larger machine") from None
    except ImportError as error:
        raise UnsupportedFileError(
            f"{source.name}: the pickle needs code that is not installed ({_gist(error)}); install it, or save the "
            f"state_dict: {_SAVE}"
        ) from None
    except Exception as error:  # noqa: BLE001 — a hostile pickle can make torch raise anything
        if isinstance(error, RuntimeError) and any(word in str(error) for word in ("resize storage", "overflow")):
            raise LimitError(
                f"{source.name}: a tensor claims to be larger than the data stored for it ({_gist(error)})"
            ) from None
        raise CorruptFileError(
            f"{source.name}: damaged checkpoint ({_gist(error)}); copy or download it again"
        ) from None


def _gist(error: Exception) -> str:
    """Return the line of a long message that says what happened."""
    text = str(error) or type(error).__name__
    marked = [line for line in text.splitlines() if "Unpickler error" in line]
    return printable((marked or text.splitlines())[0].strip())


def _is_module(value: object) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _unwrap(module: Any) -> torch.nn.Module:
    import torch

    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module  # type: ignore[no-any-return]
        module = inner


def _find_state_dict(content: object, name: str) -> object:
    """Return the state_dict (or module) that `content` is, or the one that it holds."""
    import torch

    if isinstance(content, torch.nn.Module):
        return content
    if not isinstance(content, Mapping):
        raise UnsupportedModelError(
            f"{name}: holds an object of type {printable(type(content).__name__)}, not a state_dict; save {_SAVE}"
        )
    inner = {key: content[key] for key in _WRAPPER_KEYS if key in content and _has_tensors(content[key])}
    if not inner:
        return content
    first, *others = inner.values()
    if any(not _same_tensors(first, other, name) for other in others):
        raise UnsupportedModelError(
            f"{name}: holds several different sets of weights, {listing(inner, 12)}; save the one you mean on its own"
        )
    return first


def _has_tensors(value: object) -> bool:
    import torch

    if isinstance(value, torch.nn.Module):
        return True
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _same_tensors(a: object, b: object, name: str) -> bool:
    import torch

    if a is b:
        return True
    first, second = _tensors_of(a, name), _tensors_of(b, name)
    if first.keys() != second.keys():
        return False
    # Identity of the stored data, not of the values: to compare values could mean to walk through an expanded view.
    return all(
        t.layout is torch.strided
        and second[key].layout is torch.strided
        and not (t.is_meta or second[key].is_meta)
        and t.shape == second[key].shape
        and t.stride() == second[key].stride()
        and t.data_ptr() == second[key].data_ptr()
        for key, t in first.items()
    )


def _tensors_of(value: object, name: str) -> Mapping[str, torch.Tensor]:
    """Return `value`, a module or a mapping, as a state_dict; raise UnsupportedModelError if it is not one."""
    import torch

    if isinstance(value, torch.nn.Module):
        value = {k: v for k, v in value.state_dict().items() if isinstance(v, torch.Tensor)}
    if not isinstance(value, Mapping) or not value:
        raise UnsupportedModelError(f"{name}: holds no tensors; save {_SAVE}")
    others = [key for key, v in value.items() if not isinstance(key, str) or not isinstance(v, torch.Tensor)]
    if len(others) == len(value):
        raise UnsupportedModelError(f"{name}: holds no state_dict, only {listing(others)}; save {_SAVE}")
    if others:
        raise UnsupportedModelError(
            f"{name}: entries of the state_dict are not tensors: {listing(others)}; save {_SAVE}"
        )
    return value


def _without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for _ in range(4):  # the wrappers can be nested, though hardly deeper
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) and k != p for k in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _load_safetensors(source: Source, limits: Limits) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata = _safetensors_metadata(source, limits)
    try:
        tensors = load(source.data)
    except SafetensorError as error:
        raise CorruptFileError(f"{source.name}: damaged safetensors file ({_gist(error)}); download it again") from None
    except MemoryError:
        raise LimitError(f"{source.name}: the checkpoint does not fit in memory; use a larger machine") from None
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UnsupportedModelError(f"{source.name}: tensors that torch cannot hold ({_gist(error)})") from None
    if not tensors:
        raise UnsupportedModelError(f"{source.name}: holds no tensors; save the weights again")
    return Checkpoint(_without_prefix(plain_tensors(tensors, source.name, len(source.data), limits)), metadata)


def _safetensors_metadata(source: Source, limits: Limits) -> dict[str, str]:
    """Check what the library does not: the header's size, double names and sizes past the limits."""
    length = int.from_bytes(source.data[:8], "little")
    if length > limits.max_header_bytes:
        raise LimitError(
            f"{source.name}: a safetensors header of {length:,} bytes; the limit is {limits.max_header_bytes:,}"
        )
    if len(source.data) < 8 + length:
        raise CorruptFileError(f"{source.name}: the safetensors file is cut off; copy or download it again")
    try:
        header = json.loads(source.data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source.name}: damaged safetensors header ({_gist(error)})") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{source.name}: damaged safetensors header (the metadata are not text)")
    return metadata


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        # Readers differ in which of the two they take.
        raise ValueError("a name stands in it twice")
    return result
