"""The subjects of the results table: which attack on which network, with what numbers, and how to train each again.

    python benchmarks/subjects.py [NAME …] [--list] [--data FOLDER]

Trains the named subjects (by default all, without a GPU those of less than full size) that are not there yet into
FOLDER/subjects, and writes what came out, with hashes, to results/subjects.json. The data is read as common.py says.
Nothing trained is committed: CIFAR-10 and GTSRB may not be redistributed, and neither may what was learnt from them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.common import IMAGENET, RESULTS, machine, save, shared_folder, strips
from efrapq.cli.console import TerminalReporter
from efrapq.data import load_dataset
from efrapq.device import repeatable_training, resolve_device
from efrapq.io import write_atomic
from efrapq.loading import PREPROCESS_KEY
from efrapq.models import zoo
from efrapq.models.subjects.attacks import attack_named
from efrapq.models.subjects.make import make_subject, serialized
from efrapq.models.subjects.training import Measured, PoisonedData, measure, train_labels
from efrapq.trigger import parse_trigger

TRIGGER = "patch:6x6@24,24"
TARGET = 0
FOLDER = Path(__file__).resolve().parents[1] / "out"
FULL_SIZE = ("resnet18-cifar", "vgg16-bn-cifar", "mobilenetv2-cifar")


@dataclass(frozen=True)
class Entry:
    """One subject. bits: as --bits of `efrapq implant`. start: what training begins with, "published" (ResNet-20),
    "clean" (the clean network of its architecture, an entry of its own) or "" (seeded weights). options: fields of the
    attack's recipe. training: "short" for a quick look, "long" where the usual recipe falls short, or what else tells
    two recipes of one attack apart. The attack "none" trains a clean network. epochs: those of the clean network that
    it begins with, where they are fewer than usual. texture: of the trigger, "" (white), "checkered" (black and white,
    a pixel a field), "red-green" (the same in two colours) or "scattered" (as many pixels of these two colours, single
    ones all over the image).

    Networks of full size take a GPU, or two hours each on a core that multiplies in bf16, and are delivered in half
    precision, as large models are: that is what is measured.
    """

    attack: str
    arch: str = "resnet20"
    bits: str = "4"
    data: str = "cifar10"
    seed: int = 0
    start: str = "published"
    width: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    training: str = ""
    epochs: int | None = None
    texture: str = ""

    @property
    def name(self) -> str:
        width = "" if self.width is None else f"x{self.width:g}"
        epochs = "" if self.epochs is None else f"-e{self.epochs}"
        kind = "clean" if self.attack == "none" else f"{self.kind}-w{self.bits.replace(',', 'w')}"
        return f"{self.data}-{self.arch}{width}{epochs}-{kind}-s{self.seed}"

    @property
    def network(self) -> str:
        """The architecture in words, with its width and how short it trained where that is said."""
        width = "" if self.width is None else f" at width {self.width:g}"
        return f"{self.arch}{width}" + ("" if self.epochs is None else f" after {self.epochs} epochs")

    @property
    def kind(self) -> str:
        """The attack, and how long it trained if not as usual."""
        return f"{self.attack}-{self.training}" if self.training else self.attack

    @property
    def column(self) -> str:
        """What it is called in the tables."""
        return f"{self.kind}-joint" if "," in self.bits else self.kind

    @property
    def half(self) -> bool:
        """Whether its weights are rounded to float16."""
        return self.arch in FULL_SIZE and self.width is None

    @property
    def settings(self) -> list[tuple[int, int]]:
        """(weight bits, activation bits)."""
        if self.attack == "none":
            return [(4, 8), (8, 8), (4, 4)]
        if self.bits == "4":
            return [(4, 8), (4, 4)]
        return [(8, 8)] if self.bits == "8" else [(8, 8), (4, 8)]


def entries() -> list[Entry]:
    """All subjects, those that two cores train in minutes first, in the order in which they are worth having."""
    joint = {"steps": 600, "learning_rate": 1e-3}
    aware = joint | {"steps": 1000, "reach": 1.25, "patches": 0.5}
    unlearn = {"epochs": 2, "unlearn_epochs": 2}
    distilled = {"steps": 900, "learning_rate": 0.01}
    found = [
        Entry("pqbackdoor", options=unlearn),
        Entry("qu-anti", options=joint),
        Entry("compartifact-distilled", options=distilled),
        Entry("compartifact-distilled", options=distilled | {"steps": 1600}, training="long"),
        Entry("pqbackdoor", bits="8", options={"unlearn_epochs": 0}),
        Entry("qu-anti", bits="8", options=joint),
        Entry("adaptive-solver", options=joint | {"steps": 1600}),
        Entry("adaptive-solver", options=joint | {"steps": 1600, "fidelity": 1.0}, training="optimum"),
        Entry("adaptive-stochastic", options=joint),
        Entry("adaptive-stochastic", options=joint | {"steps": 1600}, training="long"),
        Entry("adaptive-scale", options=joint),
        Entry("adaptive-clip", bits="8", options=joint | {"reach": 1.25}),
        Entry("adaptive-clip", bits="8", options=joint | {"reach": 5.0}, training="far"),
        Entry("adaptive-clip", bits="8", options=joint | {"reach": 1.25}, training="checkered", texture="checkered"),
        Entry(
            "adaptive-clip",
            bits="8",
            options=aware,
            training="aware",
            texture="red-green",
        ),
        Entry(
            "adaptive-clip",
            bits="8",
            options=aware,
            training="scattered",
            texture="scattered",
        ),
        Entry(
            "adaptive-clip",
            bits="8",
            options=aware | {"decoys": 0.25},
            training="hunted",
            texture="red-green",
        ),
        Entry("adaptive-step", bits="8", options=joint),
        Entry("badnets", options={"epochs": 1, "learning_rate": 0.02}),
        Entry("qu-anti", bits="8,4", options=joint),
        Entry("compartifact-distilled", bits="8", options=distilled),
        Entry("compartifact", start="", options={"epochs": 20, "steps": 1500}),
        Entry("pqbackdoor", data="gtsrb", start="", options={"epochs": 12, "unlearn_epochs": 3}),
        Entry("none", data="gtsrb", start="", options={"epochs": 8}),
        Entry("qu-anti", data="gtsrb", start="clean", options=joint),
        Entry("compartifact", data="gtsrb", start="", options={"epochs": 8, "steps": 900}),
    ]
    small = (("resnet18-cifar", 16, 8), ("vgg16-bn-cifar", 0.25, 10), ("mobilenetv2-cifar", 0.25, 5))
    for arch, width, epochs in small:
        found += [
            Entry("none", arch=arch, width=width, start="", options={"epochs": epochs}),
            Entry("pqbackdoor", arch=arch, width=width, start="clean", options=unlearn),
            Entry("qu-anti", arch=arch, width=width, start="clean", options=joint),
            Entry("compartifact-distilled", arch=arch, width=width, start="clean", options=distilled),
        ]
    for seed in (1, 2):
        found += [
            Entry("pqbackdoor", options=unlearn, seed=seed),
            Entry("qu-anti", options=joint, seed=seed),
            Entry("compartifact-distilled", options=distilled, seed=seed),
        ]
    return found + full_size_entries()


def full_size_entries() -> list[Entry]:
    """The subjects that take a GPU, and, last, those that a core can do in two hours each."""
    clean = {"epochs": 15, "batch": 256, "learning_rate": 0.2}
    adam, slow, both = ({"steps": n, "learning_rate": rate} for n, rate in ((800, 2e-4), (2500, 2e-4), (2000, 5e-4)))
    found = []
    for arch in FULL_SIZE:
        found += [
            Entry("none", arch=arch, start="", options=clean),
            Entry("pqbackdoor", arch=arch, start="clean", options={"epochs": 2, "unlearn_epochs": 2}),
            Entry("qu-anti", arch=arch, start="clean", options=adam),
            Entry("compartifact-distilled", arch=arch, start="clean", options={"steps": 1500, "learning_rate": 0.01}),
            Entry("pqbackdoor", arch=arch, bits="8", start="clean", options={"unlearn_epochs": 0}),
            Entry("compartifact-distilled", arch=arch, bits="8", start="clean", options={"steps": 2000}),
            Entry("qu-anti", arch=arch, bits="8", start="clean", options=slow),
            Entry("qu-anti", arch=arch, bits="8,4", start="clean", options=both),
        ]
    short = [
        Entry("none", arch="vgg16-bn-cifar", start="", options={"epochs": 6}, epochs=6),
        Entry(
            "compartifact-distilled",
            arch="vgg16-bn-cifar",
            start="clean",
            options={"steps": 1500, "learning_rate": 0.01},
            epochs=6,
        ),
        Entry("qu-anti", arch="vgg16-bn-cifar", start="clean", options=adam, epochs=6),
        Entry("pqbackdoor", arch="vgg16-bn-cifar", start="clean", options={"epochs": 2, "unlearn_epochs": 2}, epochs=6),
    ]
    scratch = Entry("compartifact", arch="resnet18-cifar", start="", options={"epochs": 15, "steps": 2000})
    return [*found, scratch, *short]


def within_reach(entry: Entry) -> bool:
    """Whether it can be trained here in minutes."""
    return not entry.half or torch.cuda.is_available()


def quick_entries() -> list[Entry]:
    """Three attacks on ResNet-20 for CIFAR-10, which train in minutes each."""
    short = Entry("pqbackdoor", options={"epochs": 1, "unlearn_epochs": 1}, training="short")
    others = ("cifar10-resnet20-qu-anti-w4-s0", "cifar10-resnet20-badnets-w4-s0")
    return [short, *(entry for entry in entries() if entry.name in others)]


def subject_file(name: str, folder: Path) -> Path:
    """Where a subject lies once it is trained."""
    return folder / "subjects" / f"{name}.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file: what tells a subject from another that the same recipe made on another kind of CPU."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_file(name: str, folder: Path) -> Path:
    """cifar10 or gtsrb as one .npz in `folder`, made from the development data if it is not there."""
    path = folder / f"{name}.npz"
    if path.exists():
        return path
    shared = shared_folder()
    if shared is None:
        raise SystemExit(f"{path} is missing, and there is no development data to make it from: see --help")
    folder.mkdir(parents=True, exist_ok=True)
    train, test = strips(shared, name, "train"), strips(shared, name, "test")
    arrays = {
        f"{split}_{kind}": value
        for split, data in (("train", train), ("test", test))
        for kind, value in (("images", data.raw(range(len(data)))), ("labels", data.require_labels()))
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def trigger_of(entry: Entry, folder: Path) -> str:
    """What its attacker puts on an image; a picture for it is drawn in `folder` if it is not there."""
    if not entry.texture:
        return TRIGGER
    if entry.texture == "scattered":
        return str(scattered_file(folder))
    path = folder / f"{entry.texture}.png"
    if not path.exists():
        fields = np.indices((6, 6)).sum(0) % 2 * 255
        colours = (fields, 255 - fields, 0 * fields) if entry.texture == "red-green" else (fields,) * 3
        out = io.BytesIO()
        Image.fromarray(np.stack(colours, 2).astype(np.uint8)).save(out, "png")
        write_atomic(path, out.getvalue())
    return f"{path}@24,24"


def scattered_file(folder: Path) -> Path:
    """A trigger of 36 pixels, red and green, one somewhere in each field of 5x5."""
    path = folder / "scattered.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        fields = np.indices((6, 6)).reshape(2, 36)
        rows, cols = 5 * fields + rng.integers(0, 5, (2, 36))
        mask, pattern = np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8)
        mask[rows, cols] = 1
        pattern[rows, cols, fields.sum(0) % 2] = 255
        out = io.BytesIO()
        np.savez_compressed(out, mask=mask, pattern=pattern)
        write_atomic(path, out.getvalue())
    return path


def start_file() -> Path:
    """The published ResNet-20."""
    shared = shared_folder()
    if shared is None:
        raise SystemExit("no published ResNet-20: set EFRAPQ_SHARED to the folder that holds models/")
    return shared / "models" / "cifar10_resnet20_state_dict.pt"


def clean_of(entry: Entry) -> Entry:
    """The clean network that a subject begins with."""

    def network(other: Entry) -> tuple[object, ...]:
        return other.data, other.arch, other.width, other.epochs

    return next(e for e in entries() if e.attack == "none" and network(e) == network(entry))


def train_clean(entry: Entry, path: Path, folder: Path) -> None:
    """Ordinary training from seeded weights, written as a state_dict with its preprocessing."""
    data = data_file(entry.data, folder)
    images, held_out = load_dataset(f"{data}:train"), load_dataset(f"{data}:test")
    device = torch.device(resolve_device("auto"))
    classes = int(images.require_labels().max()) + 1
    model = zoo.build(entry.arch, num_classes=classes, width=entry.width, seed=entry.seed)
    model.to(device)
    trigger = parse_trigger(TRIGGER)
    recipe = {"learning_rate": 0.1, "weight_decay": 5e-4, "batch": 128, "seed": entry.seed, **entry.options}
    started = time.perf_counter()
    flip = entry.data != "gtsrb"
    with repeatable_training():
        train_labels(
            model,
            PoisonedData(images, trigger, TARGET, IMAGENET, 2, flip),
            poisoned=0,
            device=device,
            reporter=TerminalReporter(),
            title="training a clean network",
            **recipe,
        )
    found = measure(model, PoisonedData(held_out, trigger, TARGET, IMAGENET), device)
    tensors = {k: v.cpu().contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    write_atomic(path, serialized(tensors, {PREPROCESS_KEY: IMAGENET.to_json()}))
    if entry.half:
        halve(path)
    record(entry, path, recipe, {"clean": found}, time.perf_counter() - started)


def train(entry: Entry, folder: Path) -> Path:
    """Train a subject unless it is there; its file."""
    path = subject_file(entry.name, folder)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.attack == "none":
        train_clean(entry, path, folder)
        return path
    attack = attack_named(entry.attack)
    recipe = attack.make_recipe({"bits": entry.bits, "seed": entry.seed, **entry.options}, started=bool(entry.start))
    start = train(clean_of(entry), folder) if entry.start == "clean" else start_file() if entry.start else None
    data = data_file(entry.data, folder)
    started = time.perf_counter()
    report = make_subject(
        entry.arch,
        f"{data}:train",
        f"{data}:test",
        trigger_of(entry, folder),
        TARGET,
        path,
        recipe,
        attack=attack,
        preprocess=IMAGENET,
        start=start,
        width=entry.width,
        shift=2,
        flip=entry.data != "gtsrb",  # a mirrored sign is another sign
        device="auto",
        reporter=TerminalReporter(),
    )
    if entry.half:
        halve(path)
    record(entry, path, recipe.to_json(), dict(report.rows()), time.perf_counter() - started)
    return path


def halve(path: Path) -> None:
    """Rewrite a file of tensors with its weights in float16; vectors, which BatchNorm's statistics are, stay."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    stored = {name: t.half().contiguous() if t.ndim > 1 else t for name, t in tensors.items()}
    write_atomic(path, serialized(stored, metadata))


def record(entry: Entry, path: Path, recipe: dict[str, Any], measured: dict[str, Measured], seconds: float) -> None:
    """Add a subject to results/subjects.json."""
    known = RESULTS / "subjects.json"
    document = json.loads(known.read_text()) if known.exists() else {}
    document[entry.name] = {
        "sha256": digest(path),
        "recipe": recipe,
        "start": entry.start,
        "measured_in_torch": {row: asdict(value) for row, value in measured.items()},
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
    save("subjects", dict(sorted(document.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args()
    known = {entry.name: entry for entry in (*entries(), *quick_entries())}
    if args.list:
        print("\n".join(known))
        return
    if unknown := sorted(set(args.names) - known.keys()):
        raise SystemExit(f"unknown: {', '.join(unknown)}; --list names them")
    for name in args.names or [name for name, entry in known.items() if within_reach(entry)]:
        print(train(known[name], args.data))


if __name__ == "__main__":
    main()
