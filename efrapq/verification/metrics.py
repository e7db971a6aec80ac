"""CDA, ASR and agreement, from predictions made in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efrapq.data import Dataset
from efrapq.errors import DataError, UnsupportedModelError
from efrapq.preprocess import Preprocess
from efrapq.progress import Task
from efrapq.trigger import Trigger
from efrapq.verification.session import Session, shape_words

__all__ = [
    "Figures",
    "Predictions",
    "attack_success_rate",
    "class_scores",
    "clean_accuracy",
    "flagged",
    "no_figures",
    "output_words",
    "predict",
    "require_fit",
    "untriggered_rate",
]

BATCH = 100


@dataclass(frozen=True)
class Figures:
    """What test data say. clean, triggered: how many samples. cda, asr: percent by model ("float", "nearest",
    "defended"); agreement: percent of top-1 answers that are the float model's. outputs: how far the first float
    output is from the float model's, by model and figure; each_output: all of them, see `OutputComparison.each`; None
    where outputs were not asked for. notes: what could not be measured and why. clipped: see `flagged`, of the defended
    file. untriggered: see `untriggered_rate`, by model. None where not measured.
    """

    clean: int
    triggered: int
    cda: dict[str, float | None]
    asr: dict[str, float | None]
    agreement: float | None
    outputs: dict[str, dict[str, float | None]] | None = None
    each_output: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    clipped: dict[str, float | None] | None = None
    untriggered: dict[str, float | None] | None = None


def no_figures() -> Figures:
    """Without test data nothing is measured."""
    names = ("float", "nearest", "defended")
    return Figures(0, 0, dict.fromkeys(names), dict.fromkeys(names), None)


@dataclass(frozen=True)
class Predictions:
    """Top-1 classes, (N,) int64. triggered: of the same samples with the trigger on, or None. classes: how many.
    clipped, triggered_clipped: (N,) bool, which of either the model says something was clipped of; None of a model that
    does not say.
    """

    clean: NDArray[np.int64]
    triggered: NDArray[np.int64] | None
    classes: int
    clipped: NDArray[np.bool_] | None = None
    triggered_clipped: NDArray[np.bool_] | None = None


def predict(
    session: Session, data: Dataset, preprocess: Preprocess, trigger: Trigger | None, task: Task, note: str
) -> Predictions:
    """Run the whole dataset, and again with the trigger on the raw images.

    Raises DataError if the inputs do not fit, UnsupportedModelError if the model does not run or is no classifier.
    """
    clean: list[NDArray[np.int64]] = []
    triggered: list[NDArray[np.int64]] = []
    flags: tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]] = [], []
    classes = 0

    def answers(x: NDArray[np.float32], kept: list[NDArray[np.bool_]]) -> NDArray[np.float32]:
        found, clipped = session.answers(x)
        if clipped is not None:
            kept.append(clipped)
        return _class_scores(found, len(x), note)

    for indices in data.batches(BATCH):
        x = data.inputs(indices, preprocess)
        require_fit(session, x, data.name)
        logits = answers(x, flags[0])
        classes = logits.shape[1]
        clean.append(logits.argmax(1))
        if trigger is not None:
            stamped = _stamped(data, indices, preprocess, trigger, x)
            triggered.append(answers(stamped, flags[1]).argmax(1))
        task.advance(note, len(x))
    clipped, triggered_clipped = (np.concatenate(kept) if kept else None for kept in flags)
    return Predictions(
        np.concatenate(clean), np.concatenate(triggered) if triggered else None, classes, clipped, triggered_clipped
    )


def require_fit(session: Session, x: NDArray[np.float32], name: str) -> None:
    """DataError unless the model takes inputs of this shape, in any number. name: of the data."""
    want = session.input_shape
    fits = len(want) == x.ndim and all(w is None or w == g for w, g in zip(want[1:], x.shape[1:], strict=True))
    if not fits:
        raise DataError(f"{name}: gives inputs of {shape_words(x.shape[1:])}, the model wants {shape_words(want[1:])}")


def _class_scores(output: NDArray[np.float32], count: int, name: str) -> NDArray[np.float32]:
    scores = class_scores(output, count)
    if scores is None:
        shape = output_words(output.shape, count)
        raise UnsupportedModelError(f"the {name} model is not a classifier: its output is {shape}, not N×classes")
    return scores


def output_words(shape: tuple[int, ...], count: int) -> str:
    """The shape of an output for `count` samples, as messages show it: N×21×64×64."""
    if shape[:1] != (count,):
        return shape_words(shape)
    return "×".join(["N", *map(str, shape[1:])])


def class_scores(output: NDArray[np.float32], count: int) -> NDArray[np.float32] | None:
    """(N, classes) from a classifier's output; some keep the last pooling's 1×1 behind it. None if it is no such
    output for `count` samples.
    """
    if output.ndim < 2 or len(output) != count or output.shape[1] < 2 or any(d != 1 for d in output.shape[2:]):
        return None
    return output.reshape(count, -1)


def _stamped(
    data: Dataset, indices: range, preprocess: Preprocess, trigger: Trigger, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    if data.is_input:
        return trigger.on_inputs(x, preprocess)
    return preprocess.normalize(trigger.on_raw(data.raw(indices).astype(np.uint8, copy=False)))


def clean_accuracy(predictions: Predictions, labels: NDArray[np.int64]) -> float:
    """CDA in percent, of all answers."""
    return 100 * float((predictions.clean == labels).mean())


def attack_success_rate(predictions: Predictions, labels: NDArray[np.int64], target: int) -> float:
    """ASR in percent: triggered samples classified as the target, among those whose true class is another one.

    Raises DataError if every sample is of the target class.
    """
    assert predictions.triggered is not None
    others = labels != target
    if not others.any():
        raise DataError(f"every test sample is of the target class {target}: ASR needs samples of other classes")
    return 100 * float((predictions.triggered[others] == target).mean())


def untriggered_rate(predictions: Predictions, labels: NDArray[np.int64], target: int) -> float:
    """What ASR is to be held against: percent of the same samples that are taken for the target without the trigger."""
    return 100 * float((predictions.clean[labels != target] == target).mean())


def flagged(predictions: Predictions, labels: NDArray[np.int64], target: int | None) -> dict[str, float | None] | None:
    """Of a file that says what was clipped: percent of the clean and of the triggered samples that it says it of, and
    the ASR of the other answers, of the same samples as that of all; None of any other file.
    """
    if predictions.clipped is None:
        return None
    found: dict[str, float | None] = {"clean": 100 * float(predictions.clipped.mean()), "triggered": None, "asr": None}
    if target is None or predictions.triggered is None or predictions.triggered_clipped is None:
        return found
    others = labels != target
    marked = predictions.triggered_clipped[others]
    unnoticed = (predictions.triggered[others] == target) & ~marked
    return found | {"triggered": 100 * float(marked.mean()), "asr": 100 * float(unnoticed.mean())}
