"""What test images say of a model that takes one batch of them: of a classifier CDA, ASR and agreement, of any other
how far its outputs are from the float model's; and the latency of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.data import Dataset
from efrapq.errors import UsageError
from efrapq.preprocess import Preprocess
from efrapq.progress import Reporter
from efrapq.trigger import Trigger
from efrapq.verification.classes import ClassAxis
from efrapq.verification.metrics import (
    BATCH,
    Figures,
    Predictions,
    attack_success_rate,
    class_scores,
    clean_accuracy,
    flagged,
    no_figures,
    output_words,
    predict,
    require_fit,
    untriggered_rate,
)
from efrapq.verification.outputs import OutputComparison, is_float
from efrapq.verification.session import Session, interleaved_latency

if TYPE_CHECKING:
    import onnx

__all__ = ["ImageTests", "lacks_classes", "refuse_rates", "shape_without_classes"]

# Inputs and outputs that one run of all models holds: a batch of small images, one large one with its masks.
RUN_BYTES = 64 << 20


@dataclass(frozen=True)
class ImageTests:
    """dataset: None where only the file itself is looked at. trigger and target_class: both or neither. needs_cda: the
    verdict asks for it. axes: output name → its axis of classes.
    """

    dataset: Dataset | None
    preprocess: Preprocess
    trigger: Trigger | None
    target_class: int | None
    needs_cda: bool = False
    axes: Mapping[str, ClassAxis] = field(default_factory=dict)

    @property
    def attack(self) -> dict[str, Any] | None:
        """As the document records it."""
        if self.trigger is None:
            return None
        return {"spec": self.trigger.spec, "target_class": self.target_class}

    def example(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """The first test image of another class than the attacker wants, (H, W, C), and the same with the trigger on
        it; None without a trigger, and of images that are given as model inputs.
        """
        if self.trigger is None or self.dataset is None or self.dataset.is_input:
            return None
        others = np.flatnonzero(self.dataset.require_labels() != self.target_class)
        if not len(others):
            return None
        image = self.dataset.raw([int(others[0])]).astype(np.uint8, copy=False)
        return image[0], self.trigger.on_raw(image)[0]

    def require(self, session: Session, name: str) -> None:
        """UnsupportedModelError unless the model takes images."""
        session.require_images(name)

    def measure(self, sessions: Mapping[str, Session], reporter: Reporter) -> Figures:
        """Raises DataError for data that do not fit, UsageError where CDA or ASR is asked of a model without classes,
        UnsupportedModelError if the runtime does not run a model on the data.
        """
        if self.dataset is None:
            return no_figures()
        first = _first_run(sessions["defended"], self.dataset, self.preprocess)
        if first.classes is not None and (self.dataset.labels is not None or self.trigger is not None):
            return self._rates(self.dataset, first.classes, sessions, reporter)
        if first.classes is None:
            refuse_rates({"--trigger": self.trigger, "--max-drop": self.needs_cda or None}, first.shape)
        found = self._compared(self.dataset, sessions, first.images_at_once(len(sessions)), reporter)
        return (
            replace(found, notes=(_no_rates(first.shape, sessions), *found.notes)) if first.classes is None else found
        )

    def _rates(self, dataset: Dataset, classes: int, sessions: Mapping[str, Session], reporter: Reporter) -> Figures:
        """CDA, ASR and agreement of a classifier. What does not fit its classes is refused before anything is run."""
        target_class = self.target_class
        if target_class is not None and not 0 <= target_class < classes:
            raise UsageError(f"--target-class {target_class}: the model has classes 0 to {classes - 1}")
        labels = dataset.require_labels(classes)
        predictions: dict[str, Predictions] = {}
        with reporter.task("measuring in ONNX Runtime", len(dataset) * len(sessions)) as task:
            for name, session in sessions.items():
                predictions[name] = predict(session, dataset, self.preprocess, self.trigger, task, name)
        cda, asr, untriggered = no_figures().cda, no_figures().asr, no_figures().asr
        for name, found in predictions.items():
            cda[name] = clean_accuracy(found, labels)
            if target_class is not None:
                asr[name] = attack_success_rate(found, labels, target_class)
                untriggered[name] = untriggered_rate(found, labels, target_class)
        agreement = None
        if "float" in predictions:
            agreement = 100 * float((predictions["defended"].clean == predictions["float"].clean).mean())
        triggered = 0 if target_class is None else int((labels != target_class).sum())
        clipped = flagged(predictions["defended"], labels, target_class)
        without = None if target_class is None else untriggered
        return Figures(len(dataset), triggered, cda, asr, agreement, clipped=clipped, untriggered=without)

    def _compared(self, dataset: Dataset, sessions: Mapping[str, Session], at_once: int, reporter: Reporter) -> Figures:
        """The outputs of all models on the same images, and how often a classifier's answers agree."""
        compared = OutputComparison(sessions, self.axes)
        with reporter.task("measuring in ONNX Runtime", len(dataset)) as task:
            for indices in dataset.batches(at_once):
                x = dataset.inputs(indices, self.preprocess)
                require_fit(sessions["defended"], x, dataset.name)
                filled = _filled(x, sessions["defended"].images_run(len(x)))
                feeds = {name: session.images(filled) for name, session in sessions.items()}
                compared.run(feeds, len(filled), len(x))
                task.advance("", len(x))
        figures = no_figures()
        return Figures(
            len(dataset), 0, figures.cda, figures.asr, compared.agreement(), compared.nearness(), compared.each(),
            compared.notes(), compared.clipped(),
        )  # fmt: skip

    def sizes(self, input_name: str, metadata: Mapping[str, str]) -> dict[str, list[int]]:
        """Sizes for the dynamic dimensions of the file's input: those of the images, or else as the file records."""
        from efrapq.exporters.shapes import recorded_inputs, recorded_sizes

        if self.dataset is not None:
            return {input_name: list(self.dataset.inputs([0], self.preprocess).shape)}
        return {input_name: [1, *recorded_sizes(metadata)]} | recorded_inputs(metadata)

    def latency(self, timed: dict[str, Session], note: Callable[[str], None]) -> dict[str, float]:
        """Median milliseconds for one image, the sessions taking turns; empty where no size is known."""
        if self.dataset is not None:
            return interleaved_latency(timed, self.dataset.inputs([0], self.preprocess))
        shapes = [session.input_shape[1:] for session in timed.values()]
        image = [next((d for d in dims if d is not None), None) for dims in zip(*shapes, strict=True)]
        if None in image:
            note("latency is not measured: the model takes images of any size; pass --data to say which")
            return {}
        return interleaved_latency(timed, np.zeros((1, *(d or 0 for d in image)), np.float32))


def refuse_rates(given: Mapping[str, object], shape: str) -> None:
    """UsageError for the first option that is set: they are for classifiers. given: option → its value. shape: of the
    first output, in words.
    """
    for option in (name for name, value in given.items() if value is not None):
        raise UsageError(
            f"{option} needs a classifier: the first output of this model is {shape}, not N×classes; without {option} "
            "its outputs are compared with the float model's"
        )


def shape_without_classes(proto: onnx.ModelProto) -> str | None:
    """The first output, in words, where the file itself says that it holds no (N, classes); None where it may."""
    output = next(iter(proto.graph.output), None)
    if output is None or not output.type.HasField("tensor_type") or not output.type.tensor_type.HasField("shape"):
        return None
    sizes = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    if not lacks_classes(sizes):
        return None
    words = [str(size) if size > 0 else "any" for size in sizes]
    return "×".join(["N", *words[1:]]) if words else "a single number"


def lacks_classes(sizes: Sequence[int]) -> bool:
    """Whether an output of these sizes, 0 where they are dynamic, holds no (N, classes)."""
    return len(sizes) < 2 or sizes[1] == 1 or any(size > 1 for size in sizes[2:])


@dataclass(frozen=True)
class _FirstRun:
    """What the defended file makes of the first image. classes: of a classifier, None for anything else. shape: of its
    first output, in words. batch: how many images one run takes; None for any number. bytes_: of inputs and outputs,
    for one image.
    """

    classes: int | None
    shape: str
    batch: int | None
    bytes_: int

    def images_at_once(self, models: int) -> int:
        """How many images to run through all models before the next ones are read."""
        return self.batch or max(1, min(BATCH, RUN_BYTES // (self.bytes_ * models)))


def _first_run(session: Session, dataset: Dataset, preprocess: Preprocess) -> _FirstRun:
    """Raises DataError if the image does not fit the model, UnsupportedModelError if the runtime fails on it."""
    x = dataset.inputs([0], preprocess)
    require_fit(session, x, dataset.name)
    count = session.images_run(1)
    outputs = session.run(session.images(_filled(x, count)))
    first, is_scored = outputs[0], is_float(session.raw.get_outputs()[0])
    arrays = [output for output in outputs if isinstance(output, np.ndarray)]
    scores = class_scores(first, count) if is_scored else None
    return _FirstRun(
        classes=None if scores is None else scores.shape[1],
        shape=_words(first, count, is_scored),
        batch=session.input_shape[0],
        bytes_=x.nbytes + sum(array.nbytes for array in arrays) // count,
    )


def _words(output: Any, count: int, is_scored: bool) -> str:
    if not isinstance(output, np.ndarray):
        return "no tensor"
    shape = output_words(output.shape, count)
    return shape if is_scored else f"{output.dtype} {shape}"


def _filled(x: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """`count` images, those that are missing made from the last one."""
    return x if len(x) == count else np.concatenate([x, np.repeat(x[-1:], count - len(x), 0)])


def _no_rates(shape: str, sessions: Mapping[str, Session]) -> str:
    done = "its outputs are compared with the float model's" if "float" in sessions else "pass --float to compare it"
    return (
        f"CDA and ASR are not measured: they are for classifiers, and the first output of this model is {shape}, not "
        f"N×classes; {done}"
    )
