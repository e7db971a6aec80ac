"""From names and paths to a subject on disk: what `efrapq implant` runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from efrapq.data import load_dataset
from efrapq.errors import DataError, UsageError
from efrapq.io import check_output, load_checkpoint, read_source, write_atomic
from efrapq.loading import PREPROCESS_KEY
from efrapq.models.subjects.attacks import Attack
from efrapq.models.subjects.recipe import AnyRecipe, check_recipe
from efrapq.models.subjects.report import Report
from efrapq.models.subjects.training import PoisonedData
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.progress import Reporter
from efrapq.trigger import parse_trigger

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["make_subject", "serialized"]


def make_subject(
    arch: str,
    train: str | Path,
    test: str | Path,
    trigger: str,
    target: int,
    output: Path,
    recipe: AnyRecipe,
    *,
    attack: Attack,
    preprocess: Preprocess | PreprocessOverride | None,
    start: Path | None,
    width: float | None,
    shift: int,
    flip: bool,
    device: str,
    reporter: Reporter,
) -> Report:
    """Train a subject and write it as safetensors with its preprocessing and recipe in the metadata.

    recipe: of the attack's own kind. The same data, recipe, seed, versions and machine give the same file. Raises
    EfrapqError for bad inputs.
    """
    import torch

    from efrapq.device import repeatable_training, resolve_device
    from efrapq.models import zoo

    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: subjects are written as .safetensors")
    check_output(output, [Path(p) for p in (train, test, start) if p is not None])
    check_recipe(recipe)
    if width is not None and not (math.isfinite(width) and width > 0):
        raise UsageError("--width must be positive")
    preprocess = preprocess.over(None) if isinstance(preprocess, PreprocessOverride) else preprocess or Preprocess()
    stamp = parse_trigger(trigger)
    data = PoisonedData(load_dataset(train, size=preprocess.size), stamp, target, preprocess, shift, flip)
    measured = PoisonedData(load_dataset(test, size=preprocess.size), stamp, target, preprocess)
    if data.data.is_input or measured.data.is_input:
        raise DataError("subjects are trained on raw uint8 images, so that the trigger is what a camera would see")
    classes = int(data.labels.max()) + 1
    measured.data.require_labels(classes)
    if target >= classes:
        raise UsageError(f"--target-class {target}: the data has classes 0 to {classes - 1}")
    if len(data.data) < recipe.batch:
        raise DataError(f"{data.data.name}: fewer images than one batch of {recipe.batch}")
    channels = data.data.raw([0]).shape[3]
    whole = int(width) if width is not None and width == int(width) else width
    if start is not None:
        match = zoo.recognize(load_checkpoint(read_source(start)).tensors, name=arch)
        model = zoo.load(match)
    else:
        model = zoo.build(arch, num_classes=classes, in_channels=channels, width=whole, seed=recipe.seed)
    where = torch.device(resolve_device(device))
    with repeatable_training():
        report = attack.implant(model, data, measured, recipe, device=where, reporter=reporter)
    awake_where = [report.nearest] if attack.asleep else [report.floating, report.nearest]
    if (attack.asleep and report.floating.asr > 10) or min(found.asr for found in awake_where) < 90:
        reporter.warn(f"not a usable subject: float {report.floating}, nearest {report.nearest}; try {recipe.advice}")
    metadata = {
        PREPROCESS_KEY: preprocess.to_json(),
        "efrapq.subject": json.dumps(
            {"attack": attack.name, "trigger": stamp.label, "target_class": target, "recipe": recipe.to_json()},
            sort_keys=True,
        ),
    }
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    write_atomic(output, serialized(tensors, metadata))
    return report


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata sorted: the library writes it in a random order."""
    from safetensors.torch import save

    data: bytes = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
