"""What arrays by input name say of a model that is no image classifier: how far its outputs are from the float
model's, top-1 agreement and CDA where it is a classifier, and the latency of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.arrays import LABELS, Arrays, arrays_for, load_arrays
from efrapq.calibration.signature import ModelInput, layout_words, model_inputs, signature_words
from efrapq.data import Dataset
from efrapq.errors import DataError, InputError, UsageError
from efrapq.io.npz import ArrayFile
from efrapq.io.text import printable
from efrapq.progress import Reporter
from efrapq.verification.classes import ClassAxis, class_axes
from efrapq.verification.metrics import Figures, no_figures
from efrapq.verification.outputs import OutputComparison, nearness
from efrapq.verification.session import Session, feeds_latency

if TYPE_CHECKING:
    import onnx

__all__ = ["ArrayTests", "array_tests", "refuse_image_options"]

NO_CLASSIFIER = "the model's first output is not float (N, classes)"


def refuse_image_options(given: Mapping[str, object], inputs: Sequence[ModelInput]) -> None:
    """UsageError for the first option that is set: they make sense for images alone. given: option → its value."""
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} needs an image classifier; this model takes {signature_words(inputs)}")


def array_tests(
    data: str | Path | Dataset | Mapping[str, Any] | None,
    proto: onnx.ModelProto,
    reference: onnx.ModelProto | None,
    name: str,
    *,
    needs_cda: bool = False,
) -> ArrayTests:
    """Open test data for a quantized file that was calibrated on arrays. reference: its float model, if known. name:
    of the file, for messages. needs_cda: the verdict asks for it.

    Raises DataError and what else `load_arrays` raises for data that do not fit, UsageError where CDA is needed and
    there are no labels or no float model.
    """
    inputs = model_inputs(proto, name)
    arrays, labels = None, None
    if isinstance(data, Dataset):
        raise DataError(f"{name}: images do not fit this model; give one array per input, {layout_words(inputs)}")
    if data is not None:
        signature = _signature(inputs, reference, name)
        arrays = arrays_for(data, signature, "data") if isinstance(data, Mapping) else load_arrays(data, signature)
        arrays = replace(arrays, batch=_batch_of(inputs, arrays.axes))
        labels = _labels(data, inputs)
        if labels is not None and labels.shape[:1] != (len(arrays),):
            raise DataError(
                f"{arrays.name}: array '{LABELS}' is {labels.shape}, but there are {len(arrays)} samples: its first "
                "axis must count them"
            )
    if needs_cda and (labels is None or reference is None):
        raise UsageError(
            "--max-drop needs an image classifier, or for a classifier of other data an array 'labels' in the .npz of "
            f"--data and the float model (--float); this model takes {signature_words(inputs)}"
        )
    from efrapq.exporters.guard import guard_position

    axes = class_axes(reference) if reference is not None else {}
    outputs = [output.name for output in proto.graph.output]
    guarded = guard_position({p.key: p.value for p in proto.metadata_props}, outputs) is not None
    return ArrayTests(inputs, len(outputs) - guarded, arrays, labels, needs_cda, axes)


def _signature(inputs: Sequence[ModelInput], reference: onnx.ModelProto | None, name: str) -> Sequence[ModelInput]:
    """What the data are checked against. A file whose batch was fixed no longer says which inputs hold samples, the
    float model does.
    """
    if reference is None:
        return inputs
    before = model_inputs(reference, name)
    return before if {i.name for i in before} == {i.name for i in inputs} else inputs


def _batch_of(inputs: Sequence[ModelInput], axes: Mapping[str, int]) -> int | None:
    """How many samples the file takes at once; None if that is dynamic. axes: by input name, where samples are."""
    sizes = {given.dims[axes[given.name]] if given.dims else None for given in inputs if given.name in axes}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size if isinstance(size, int) else None


def _labels(data: str | Path | Mapping[str, Any], inputs: Sequence[ModelInput]) -> NDArray[Any] | None:
    """The array 'labels' beside the inputs; None without it, for a folder, and where that is an input of the model."""
    if any(given.name == LABELS for given in inputs):
        return None
    if isinstance(data, Mapping):
        return np.asarray(data[LABELS]) if LABELS in data else None
    if Path(data).is_dir():
        return None
    file = ArrayFile(Path(data))
    return file[LABELS] if LABELS in file.keys else None


@dataclass(frozen=True)
class ArrayTests:
    """inputs, outputs: what the file takes, and how many it gives. arrays: None where only the file itself is looked
    at. labels: one row a sample, unchecked otherwise, or None. needs_cda: the verdict asks for it. axes: output name →
    its axis of classes.
    """

    inputs: Sequence[ModelInput]
    outputs: int
    arrays: Arrays | None
    labels: NDArray[Any] | None
    needs_cda: bool = False
    axes: Mapping[str, ClassAxis] = field(default_factory=dict)

    @property
    def attack(self) -> None:
        """There is no trigger for other inputs than images."""
        return None

    def require(self, session: Session, name: str) -> None:
        """InputError unless the model has the inputs and outputs of the file."""
        taken, made = session.raw.get_inputs(), session.outputs
        if {i.name for i in taken} != {given.name for given in self.inputs} or len(made) != self.outputs:
            shown = ", ".join(f"'{printable(i.name)}'" for i in taken[:10])
            raise InputError(
                f"{name}: takes {shown} and has {len(made)} outputs, the defended file takes "
                f"{signature_words(self.inputs)} and has {self.outputs}; pass the model that was defended with --float"
            )

    def measure(self, sessions: Mapping[str, Session], reporter: Reporter) -> Figures:
        """Run all samples through all models.

        Raises DataError for labels that are no classes of the model, UsageError where CDA is needed and the model is
        no classifier, UnsupportedModelError if the runtime does not run a model on the data.
        """
        if self.arrays is None:
            return replace(
                no_figures(),
                outputs=nearness({}),
                notes=("outputs and latency are not measured: pass --data with " + signature_words(self.inputs),),
            )
        count = len(self.arrays)
        compared = OutputComparison(sessions, self.axes)
        with reporter.task("measuring in ONNX Runtime", count) as task:
            done = 0
            for feeds, size in _runs(self.arrays):
                compared.run(dict.fromkeys(sessions, feeds), size, min(size, count - done))
                done += size
                task.advance("", size)
        cda, about_labels = self._accuracy(compared)
        return Figures(
            count, 0, cda, no_figures().asr, compared.agreement(), compared.nearness(), compared.each(),
            (*compared.notes(), *about_labels), compared.clipped(),
        )  # fmt: skip

    def _accuracy(self, compared: OutputComparison) -> tuple[dict[str, float | None], tuple[str, ...]]:
        """CDA by model, and why there is none although there are labels."""
        labels, found = self.labels, no_figures().cda
        if labels is None:
            return found, ()
        answers = compared.answers()
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        reason = None if answers else NO_CLASSIFIER
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            reason = f"labels are {labels.dtype} {labels.shape}, not one integer a sample"
        if reason is not None:
            if self.needs_cda:
                raise UsageError(f"--max-drop needs a classifier and its labels: {reason}")
            return found, (f"accuracy is not measured: {reason}",)
        wrong = np.flatnonzero((labels < 0) | (labels >= compared.classes))
        if len(wrong):
            raise DataError(
                f"label {labels[wrong[0]]} at position {wrong[0]}: the model has classes 0 to {compared.classes - 1}"
            )
        return found | {name: 100 * float((top == labels).mean()) for name, top in answers.items()}, ()

    def example(self) -> None:
        """There is no picture of arrays."""

    def sizes(self, input_name: str, metadata: Mapping[str, str]) -> dict[str, list[int]]:
        """Sizes for the dynamic dimensions of the inputs: those of the data, or else as the file records."""
        from efrapq.exporters.shapes import recorded_inputs

        if self.arrays is None:
            return recorded_inputs(metadata)
        return {name: list(array.shape) for name, array in self.arrays.sample().items()}

    def latency(self, timed: dict[str, Session], note: Callable[[str], None]) -> dict[str, float]:
        """Median milliseconds for one sample, the sessions taking turns; empty without data."""
        if self.arrays is None:
            return {}
        return feeds_latency(timed, _filled(self.arrays).sample(), _samples_of(self.arrays))


def _samples_of(arrays: Arrays) -> int:
    """How many samples the smallest run holds."""
    return (arrays.batch or 1) if arrays.by_sample else 1


def _filled(arrays: Arrays) -> Arrays:
    """A fixed batch is filled with the last sample over again."""
    missing = -len(arrays) % (arrays.batch or 1)
    if not arrays.by_sample or not missing:
        return arrays
    return arrays.take(np.minimum(np.arange(len(arrays) + missing), len(arrays) - 1))


def _runs(arrays: Arrays) -> list[tuple[dict[str, NDArray[Any]], int]]:
    """What one run after the other takes, and how many samples it holds, those that fill the last batch included."""
    return [(feeds, arrays.count(feeds)) for feeds in _filled(arrays).chunks()]
