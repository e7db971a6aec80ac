"""What the defaults were chosen by: lambda_E, scales, rows, calibration size and data-free inputs, on real subjects.

    python benchmarks/choices.py [SUBJECT.safetensors …] [--only TABLE …] [--images N]
    python benchmarks/choices.py --report

Every row is a file defended with one setting and measured in ONNX Runtime: CDA and ASR of the file and of its nearest
twin on the same grid, activation ranges being those that the images show. Subjects: the embedded one, and those given
(made by `efrapq implant` on CIFAR-10 or, where the name says so, GTSRB). Writes results/choices.json as it goes; rows
that are there are not measured again.
--report writes docs/CHOICES.md of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import efrapq
from benchmarks.common import RESULTS, machine, markdown, native, save, shared_folder, show, strips, write_page
from efrapq.data import Dataset, load_dataset
from efrapq.models import weights

LAMBDAS: dict[str, dict[str, Any]] = {
    "nearest": {"solver": "nearest"},
    "lambda_E = 0": {"lambda_e": 0.0},
    "absolute 1e-3": {"lambda_e": 1e-3},
    "absolute 1e-2": {"lambda_e": 1e-2},
    "absolute 1 (the paper's)": {"lambda_e": 1.0},
    "relative 1e-3": {"lambda_e": 1e-3, "error": "relative"},
    "relative 1e-2": {"lambda_e": 1e-2, "error": "relative"},
    "fidelity 1.05": {"fidelity": 1.05},
    "fidelity 1.1": {"fidelity": 1.1},
    "fidelity 1.1, relative": {"fidelity": 1.1, "error": "relative"},
    "fidelity 1.5": {"fidelity": 1.5},
    "fidelity 2": {"fidelity": 2.0},
}
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "lambda": LAMBDAS,
    "scale": {
        f"{scale}, {word}": {"scale": scale, **options}
        for scale in ("minmax", "mse", "refit")
        for word, options in (("lambda_E = 0", {"lambda_e": 0.0}), ("fidelity 1.1", {"fidelity": 1.1}))
    },
    "images": {f"{n} images": {"calib_size": n} for n in (64, 128, 256, 512, 1024)},
    "rows": {f"{n}·D rows": {"rows": n} for n in (2, 4, 8, 16, 32, 64)},
    "edges": {"edges 8 bits": {}, "edges 4 bits": {"edge_bits": 4}},
    "data-free": {
        f"W{bits}A8, {word}": {"bits": bits, **options}
        for bits in (4, 8)
        for word, options in (("real images", {}), ("no data", {"calib": None}))
    },
    "bits": {f"W{b}": {"bits": b} for b in range(2, 9)},
}


@dataclass(frozen=True)
class Subject:
    """A backdoored model with what is needed to judge a file made of it."""

    name: str
    path: Path
    bits: int
    calibration: Dataset
    test: Dataset
    trigger: str
    target: int


def subjects(paths: list[Path], images: int) -> list[Subject]:
    """The embedded subject at 4 bits, and the given ones at the bits of their recipes."""
    found = [
        Subject(
            "embedded, Fashion-MNIST",
            Path(weights.SUBJECT),
            4,
            load_dataset(weights.SAMPLES, split="calib"),
            load_dataset(weights.SAMPLES, split="test"),
            weights.TRIGGER,
            weights.TARGET_CLASS,
        )
    ]
    folder = shared_folder()
    for path in paths:
        if folder is None:
            print(f"{path}: skipped, no images: set EFRAPQ_SHARED")
            continue
        header = path.read_bytes()
        length = int.from_bytes(header[:8], "little")
        recipe = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["efrapq.subject"])
        source = "gtsrb" if path.stem.startswith("gtsrb") else "cifar10"
        test = strips(folder, source, "test")
        test = test.select(np.arange(min(images, len(test))))
        training = strips(folder, source, "train", 1)
        found.append(
            Subject(
                path.stem,
                path,
                int(recipe["recipe"]["bits"]),
                training,
                test,
                recipe["trigger"],
                int(recipe["target_class"]),
            )
        )
    return found


def measure(subject: Subject, options: dict[str, Any]) -> dict[str, Any]:
    """Defend with these options, verify in ONNX Runtime."""
    settings = {"bits": subject.bits, "calib": subject.calibration, "target": native(), "stress": False} | options
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defended.onnx"
        made = efrapq.defend(subject.path, path, **settings)
        found = efrapq.verify(
            path, data=subject.test, trigger=subject.trigger, target_class=subject.target, float_model=subject.path
        ).document
    layers = made.evidence["layers"]
    return {
        "cda": found["cda"],
        "asr": found["asr"],
        "agreement": found["agreement"],
        "flipped": made.evidence["flipped"],
        "loss": sum(np.log(max(layer["loss"], 1e-30)) for layer in layers) / len(layers),
        "seconds": sum(made.evidence["timing"]["layers"].values()),
    }


HEADER = ("subject", "setting", "float", "nearest", "defended", "agreement", "flipped %", "L_A")


def row(subject: str, name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of a table, as in HEADER."""
    figures = (f"{found['cda'][key]:.2f} / {found['asr'][key]:.2f}" for key in ("float", "nearest", "defended"))
    loss = f"{np.exp(found['loss']):.4g}"
    return (subject, name, *figures, f"{found['agreement']:.2f}", f"{found['flipped']:.1f}", loss)


def write_report(rows: dict[str, dict[str, Any]]) -> None:
    """docs/CHOICES.md: CHOICES.template.md with each `{{table}}` filled in."""
    tables = {}
    for table in TABLES:
        keys = [key.split(" | ") for key in rows if key.startswith(f"{table} | ")]
        lines = [row(subject, name, rows[f"{table} | {subject} | {name}"]) for _, subject, name in keys]
        tables[table] = markdown(HEADER, lines)
    write_page("CHOICES", tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--images", type=int, default=2000, help="test images of the given subjects")
    parser.add_argument("--report", action="store_true", help="write docs/CHOICES.md of what was measured")
    args = parser.parse_args()
    path = RESULTS / "choices.json"
    document = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if args.report:
        write_report(document["rows"])
        return
    document["machine"] = machine()
    for table in args.only:
        rows = []
        for subject in subjects(args.subjects, args.images):
            for name, options in TABLES[table].items():
                key = f"{table} | {subject.name} | {name}"
                if key not in document["rows"]:
                    document["rows"][key] = measure(subject, options)
                    save("choices", document)
                rows.append(row(subject.name, name, document["rows"][key]))
        show(f"{table} (CDA / ASR, %; L_A: geometric mean over layers)", HEADER, rows)


if __name__ == "__main__":
    main()
