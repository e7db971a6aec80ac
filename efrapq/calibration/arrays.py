"""Calibration data for any model: one array per input, by the input's name.

The arrays have the model's own layout. The first axis counts samples, or the one on which an input carries the batch,
as the state of a recurrent network does. An input without such an axis (a scalar, the state of a model whose batch is
fixed) takes one array of its whole shape, which goes with every sample. The data are an `.npz` file or a folder of
them, each with one sample or with several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.signature import ModelInput, fixed_batch, layout_words, sample_axes, signature_words
from efrapq.errors import DataError, LimitError, UnsupportedModelError
from efrapq.io.npz import MAX_ARRAY_BYTES, ArrayFile
from efrapq.io.text import listing, printable

__all__ = ["Arrays", "arrays_for", "load_arrays"]

# Values a chunk holds of the largest input: with the activations of a few hundred channels some 10 MB.
CHUNK_VALUES = 4096
# Test data for `verify` may lie in the same file.
LABELS = "labels"


@dataclass(frozen=True)
class Arrays:
    """Checked arrays in the types that the model takes. by_sample: those that count samples, on the axis that `axes`
    has by name; whole: for all samples the same. batch: how many samples the model takes at once, None for any number.
    """

    name: str
    by_sample: Mapping[str, NDArray[Any]]
    axes: Mapping[str, int]
    whole: Mapping[str, NDArray[Any]]
    batch: int | None

    def __len__(self) -> int:
        """How many samples there are. Without an input that counts them, there is one."""
        return self.count(self.by_sample)

    def count(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """How many samples one run takes; feeds: its arrays by input name."""
        return min((int(feeds[name].shape[self.axes[name]]) for name in self.by_sample), default=1)

    def take(self, positions: NDArray[np.int64]) -> Arrays:
        """The samples at these positions, in this order."""
        taken = {name: np.take(array, positions, self.axes[name]) for name, array in self.by_sample.items()}
        return replace(self, by_sample=taken)

    def subset(self, count: int, seed: int) -> Arrays:
        """At most `count` samples, drawn without replacement and kept in their order."""
        if count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def sample(self) -> dict[str, NDArray[Any]]:
        """The smallest input that the model takes: one sample, or one batch where that is fixed."""
        return self._run(0, self.batch or 1)

    def chunks(self) -> list[dict[str, NDArray[Any]]]:
        """The samples in runs of the network. A fixed batch leaves out what does not fill the last one.

        Raises DataError if not even one is filled.
        """
        count = len(self)
        if not self.by_sample:
            return [dict(self.whole)]
        size = self.batch or self._chunk_size()
        if self.batch is not None:
            if count < size:
                raise DataError(
                    f"{self.name}: holds {count} samples, fewer than the {size} that the model takes at once"
                )
            count -= count % size
        return [self._run(start, min(start + size, count)) for start in range(0, count, size)]

    def _run(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """What a run over these samples takes."""
        cut = {
            name: np.ascontiguousarray(array[(*(slice(None),) * self.axes[name], slice(start, stop))])
            for name, array in self.by_sample.items()
        }
        return cut | dict(self.whole)

    def _chunk_size(self) -> int:
        largest = max(int(array.size // array.shape[self.axes[name]]) for name, array in self.by_sample.items())
        return max(8, min(128, CHUNK_VALUES // largest))


def load_arrays(path: str | Path, inputs: Sequence[ModelInput]) -> Arrays:
    """Read an `.npz` file or a folder of them for a model with these inputs.

    Raises DataError naming the file, the array and what the model takes, and CorruptFileError, UnsafeFileError or
    LimitError for a bad archive.
    """
    path = Path(path)
    name = printable(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as exc:
        raise DataError(f"{name}: cannot be opened ({printable(exc.strerror)}); check the path") from exc
    if not exists:
        raise DataError(f"{name}: no such file or folder; {_advice(inputs)}")
    if not is_folder:
        return arrays_for(_read(path, inputs), inputs, name)
    return arrays_for(_read_folder(path, inputs), inputs, name)


def arrays_for(arrays: Mapping[str, NDArray[Any]], inputs: Sequence[ModelInput], name: str = "calibration") -> Arrays:
    """Check arrays by input name against what the model takes. Raises DataError where they do not fit."""
    _require_names(arrays.keys(), inputs, name)
    found = sample_axes(inputs)
    axes: dict[str, int] = {}
    by_sample: dict[str, NDArray[Any]] = {}
    whole: dict[str, NDArray[Any]] = {}
    for given in inputs:
        where = f"{name}: array '{printable(given.name)}'"
        array = _typed(np.asarray(arrays[given.name]), given, where)
        axis = found[given.name]
        if axis is None:
            _require_whole(array, given, where)
            whole[given.name] = array
        else:
            _require_samples(array, given, axis, where)
            by_sample[given.name], axes[given.name] = array, axis
    checked = Arrays(name, by_sample, axes, whole, fixed_batch(inputs))
    _require_same_count(checked)
    _require_same_sizes(checked, inputs)
    return checked


def _advice(inputs: Sequence[ModelInput]) -> str:
    return f"save one array per input with numpy.savez, {layout_words(inputs)}"


def _read(path: Path, inputs: Sequence[ModelInput]) -> dict[str, NDArray[Any]]:
    """The arrays of one file that the model asks for, their names checked before any is unpacked."""
    file = ArrayFile(path)
    _require_names(file.keys, inputs, file.name)
    return {given.name: file[given.name] for given in inputs}


def _read_folder(path: Path, inputs: Sequence[ModelInput]) -> dict[str, NDArray[Any]]:
    """All samples of a folder, in the order of the files' names."""
    name = printable(path)
    try:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".npz" and not p.name.startswith("."))
    except OSError as exc:
        raise DataError(f"{name}: cannot be listed ({printable(exc.strerror)}); check the permissions") from exc
    if not files:
        raise DataError(f"{name}: no .npz files in it; {_advice(inputs)}")
    axes = sample_axes(inputs)
    parts: dict[str, list[NDArray[Any]]] = {given.name: [] for given in inputs}
    total = 0
    for file in files:
        arrays = _read(file, inputs)
        total += sum(array.nbytes for array in arrays.values())
        if total > MAX_ARRAY_BYTES:
            raise LimitError(f"{name}: holds more than {MAX_ARRAY_BYTES:,} bytes of arrays; use fewer samples")
        for given in inputs:
            held, array = parts[given.name], arrays[given.name]
            where = f"{printable(file)}: array '{printable(given.name)}'"
            axis = axes[given.name]
            if axis is not None:
                held.append(_joinable(array, given, axis, held, where))
            elif not held:
                held.append(array)
            elif not np.array_equal(held[0], array):
                raise DataError(
                    f"{where} differs from the files before: this input of the model has no axis for samples, so it "
                    "must be the same in all files"
                )
    # What has no samples is held once.
    return {key: np.concatenate(held, axes[key] or 0) if len(held) > 1 else held[0] for key, held in parts.items()}


def _joinable(
    array: NDArray[Any], given: ModelInput, axis: int, held: Sequence[NDArray[Any]], where: str
) -> NDArray[Any]:
    """The array with its axis of samples, which a file with one sample may leave out, ready to follow those held."""
    if given.dims is not None and array.ndim == len(given.dims) - 1:
        array = np.expand_dims(array, axis)
    if array.ndim <= axis or (held and _one(array, axis) != _one(held[0], axis)):
        before = f" and {held[0].shape} in the files before" if held else ""
        raise DataError(f"{where} is {array.shape}{before}; bring all samples to one size, e.g. by padding")
    if held and array.dtype != held[0].dtype:
        raise DataError(f"{where} is {array.dtype} and {held[0].dtype} in the files before")
    return array


def _one(array: NDArray[Any], axis: int) -> tuple[int, ...]:
    """The shape of one sample."""
    return (*array.shape[:axis], *array.shape[axis + 1 :])


def _require_names(held: Any, inputs: Sequence[ModelInput], name: str) -> None:
    wanted = {given.name for given in inputs}
    missing = [given for given in inputs if given.name not in held]
    if missing:
        raise DataError(
            f"{name}: has no array '{printable(missing[0].name)}'; the model takes {signature_words(inputs)}, "
            f"the data hold {listing(sorted(held), 10) or 'nothing'}"
        )
    unknown = sorted(set(held) - wanted - {LABELS})
    if unknown:
        raise DataError(
            f"{name}: {listing(unknown)} {'are no inputs' if len(unknown) > 1 else 'is no input'} of the model, which "
            f"takes {signature_words(inputs)}; leave out what it does not take"
        )


def _typed(array: NDArray[Any], given: ModelInput, where: str) -> NDArray[Any]:
    """The array in the input's type. Floats change their width, integers too where all values fit; nothing else."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where} holds {printable(array.dtype, 40)}, not numbers")
    both_integers = array.dtype.kind in "iu" and given.dtype.kind in "iu"
    if not both_integers and array.dtype.kind != given.dtype.kind:
        raise DataError(f"{where} is {array.dtype}, the model takes {given.dtype}: convert it with astype")
    if both_integers and array.size:
        limits = np.iinfo(given.dtype.name)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise DataError(f"{where} holds {low if low < limits.min else high}, which {given.dtype} cannot")
    if not given.is_float:
        return np.ascontiguousarray(array, given.dtype).reshape(array.shape)
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused
        typed = np.ascontiguousarray(array, given.dtype).reshape(array.shape)
    if typed.size and not (np.isfinite(typed.min()) and np.isfinite(typed.max())):
        raise DataError(f"{where} holds NaN or infinity{'' if np.isinf(array).any() else ' as ' + str(given.dtype)}")
    return typed


def _require_samples(array: NDArray[Any], given: ModelInput, axis: int, where: str) -> None:
    counted = f"axis {axis}" if axis else "first axis"
    takes = f"the model takes {given.dims_words()}, {counted} the samples"
    if array.ndim == 0 or (given.dims is not None and array.ndim != len(given.dims)):
        raise DataError(f"{where} is {array.shape}; {takes}")
    if array.size == 0:
        raise DataError(f"{where} is empty: its shape is {array.shape}")
    for position, (size, want) in enumerate(zip(array.shape, given.dims or (), strict=False)):
        if position != axis and isinstance(want, int) and size != want:
            raise DataError(f"{where} is {array.shape}: axis {position} has {size}, not {want}; {takes}")


def _require_whole(array: NDArray[Any], given: ModelInput, where: str) -> None:
    dims = given.dims or ()
    if not all(isinstance(d, int) for d in dims):
        raise UnsupportedModelError(
            f"{where}: it is not certain which axis of the model's input {given.dims_words()} counts samples: the "
            "first size is fixed, and the names of the others do not say; export the model with the batch on the first "
            "axis, or with all sizes of this input fixed"
        )
    if array.shape != dims:
        raise DataError(
            f"{where} is {array.shape}; this input of the model has no axis for samples: give one array of exactly "
            f"{given.dims_words()}, which goes with all of them"
        )


def _require_same_count(arrays: Arrays) -> None:
    counts = {key: array.shape[arrays.axes[key]] for key, array in arrays.by_sample.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"'{printable(key)}' {count}" for key, count in counts.items())
        raise DataError(f"{arrays.name}: the arrays hold different numbers of samples: {shown}")


def _require_same_sizes(arrays: Arrays, inputs: Sequence[ModelInput]) -> None:
    """A dimension that several inputs call by one name has one size."""
    seen: dict[str, tuple[str, int]] = {}
    for given in inputs:
        if given.name not in arrays.by_sample or given.dims is None:
            continue
        for axis, (size, dim) in enumerate(zip(arrays.by_sample[given.name].shape, given.dims, strict=True)):
            if not isinstance(dim, str) or axis == arrays.axes[given.name]:
                continue
            other, expected = seen.setdefault(dim, (given.name, size))
            if size != expected:
                raise DataError(
                    f"{arrays.name}: dimension '{printable(dim)}' is {expected} in array '{printable(other)}' but "
                    f"{size} in '{printable(given.name)}'"
                )
