"""What labelled test images say of an image classifier: CDA, ASR, agreement, and the latency of one image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from efrapq.data import Dataset, Preprocess
from efrapq.errors import UsageError
from efrapq.progress import Reporter
from efrapq.trigger import Trigger
from efrapq.verification.metrics import Figures, Predictions, attack_success_rate, clean_accuracy, no_figures, predict
from efrapq.verification.session import Session, interleaved_latency

__all__ = ["ImageTests"]


@dataclass(frozen=True)
class ImageTests:
    """dataset: None where only the file itself is looked at. trigger and target_class: both or neither."""

    dataset: Dataset | None
    preprocess: Preprocess
    trigger: Trigger | None
    target_class: int | None

    @property
    def attack(self) -> dict[str, Any] | None:
        """As the document records it."""
        if self.trigger is None:
            return None
        return {"spec": self.trigger.spec, "target_class": self.target_class}

    def require(self, session: Session, name: str) -> None:
        """UnsupportedModelError unless the model takes images."""
        session.require_images(name)

    def measure(self, sessions: Mapping[str, Session], reporter: Reporter) -> Figures:
        """Raises DataError for data that do not fit, UnsupportedModelError for a model that is no classifier."""
        dataset, target_class = self.dataset, self.target_class
        if dataset is None:
            return no_figures()
        predictions: dict[str, Predictions] = {}
        with reporter.task("measuring in ONNX Runtime", len(dataset) * len(sessions)) as task:
            for name, session in sessions.items():
                predictions[name] = predict(session, dataset, self.preprocess, self.trigger, task, name)
        classes = predictions["defended"].classes
        if target_class is not None and not 0 <= target_class < classes:
            raise UsageError(f"--target-class {target_class}: the model has classes 0 to {classes - 1}")
        cda, asr = no_figures().cda, no_figures().asr
        if dataset.labels is not None or self.trigger is not None:
            labels = dataset.require_labels(classes)
            for name, found in predictions.items():
                cda[name] = clean_accuracy(found, labels)
                if target_class is not None:
                    asr[name] = attack_success_rate(found, labels, target_class)
        agreement = None
        if "float" in predictions:
            agreement = 100 * float((predictions["defended"].clean == predictions["float"].clean).mean())
        return Figures(len(dataset), self._attacked(dataset), cda, asr, agreement)

    def _attacked(self, dataset: Dataset) -> int:
        if self.target_class is None or dataset.labels is None:
            return 0
        return int((dataset.labels != self.target_class).sum())

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
