"""An encoder of BERT-base's size: how long it takes, how large it gets, and what runs on integers.

    python benchmarks/encoder.py [--small]

12 layers of width 768 with 12 heads and 3,072 hidden units, 85 million weights in 72 matrices, on UTF-8 bytes: its
weights are seeded and untrained, so that the figures beside float say what rounding costs such a graph and nothing
about language. Calibrated on pieces of this project's documentation, compared on other pieces. W8A8, and 4-bit weights
with one scale per 32 and per 128 inputs beside float activations. Every file is defended in a process of its own.
--small: two layers of width 64, to see that it works. Writes results/encoder.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import efrapq
from benchmarks.common import DOCS, RESULTS, machine, save, show

LENGTH, CALIBRATION, TEST, CLASSES = 64, 48, 24, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"bits": 8, "act_bits": 8},
    "W4, blocks of 32": {"bits": 4, "act_bits": 32, "block": 32},
    "W4, blocks of 128": {"bits": 4, "act_bits": 32, "block": 128},
}


class Block(nn.Module):
    """One layer of BERT: attention and a feed-forward network, each added and normalized."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = torch.softmax(query @ key.transpose(2, 3) / (width // self.heads) ** 0.5, -1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Bytes to classes."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.bytes(ids) + self.places)
        for block in self.blocks:
            x = block(x)
        return self.classify(x[:, 0])


def pieces() -> NDArray[np.int64]:
    """(CALIBRATION + TEST, LENGTH) bytes of text, from places far apart."""
    text = b"".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))
    starts = np.linspace(0, len(text) - LENGTH, CALIBRATION + TEST).astype(int)
    rows = np.stack([np.frombuffer(text[a : a + LENGTH], np.uint8) for a in starts]).astype(np.int64)
    return np.random.default_rng(0).permutation(rows)


def write_model(path: Path, small: bool) -> int:
    """The encoder as ONNX; the number of its weights."""
    torch.manual_seed(0)
    model = Encoder(2, 64, 4, 256) if small else Encoder(12, 768, 12, 3072)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, LENGTH, dtype=torch.int64),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["ids"],
            output_names=["scores"],
            dynamic_axes={"ids": {0: "n"}, "scores": {0: "n"}},
        )
    return sum(p.numel() for p in model.parameters())


def defend(path: Path, calibration: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """In this process: what it took."""
    started = time.perf_counter()
    efrapq.defend(path, output, calib=calibration, **settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def measure(folder: Path, name: str) -> dict[str, Any]:
    """One setting, defended in its own process and verified."""
    path, output = folder / "encoder.onnx", folder / "quantized.onnx"
    call = [sys.executable, __file__, "--defend", name, str(folder)]
    cost = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE).stdout)
    found = efrapq.verify(output, data=folder / "test.npz", float_model=path, threads=torch.get_num_threads()).document
    return cost | {
        "bytes": output.stat().st_size,
        "float_bytes": path.stat().st_size,
        "layers": found["codes"]["layers"],
        "flipped": found["codes"]["flipped"],
        "match": found["codes"]["match"],
        "kernels": {key: found["kernels"][key] for key in ("integer", "float")},
        "outputs": found["outputs"],
        "latency_ms": found["latency_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--defend", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.defend:
        name, folder = args.defend[0], Path(args.defend[1])
        cost = defend(folder / "encoder.onnx", folder / "calibration.npz", folder / "quantized.onnx", SETTINGS[name])
        print(json.dumps(cost))
        return
    known = RESULTS / "encoder.json"
    document: dict[str, Any] = json.loads(known.read_text()) if known.exists() and not args.small else {"rows": {}}
    document |= {"machine": machine(), "length": LENGTH, "calibration": CALIBRATION}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        document["weights"] = write_model(folder / "encoder.onnx", args.small)
        rows = pieces()
        np.savez(folder / "calibration.npz", ids=rows[:CALIBRATION])
        np.savez(folder / "test.npz", ids=rows[CALIBRATION:])
        for name in args.only:
            document["rows"][name] = measure(folder, name)
            if not args.small:
                save("encoder", document)
    show(f"An encoder with {document['weights'] / 1e6:.0f} million weights", HEADER, encoder_rows(document))


HEADER = ("", "s", "peak GiB", "size", "layers", "kernels", "flipped %", "cosine", "nearest's", "float, ms", "ms")


def encoder_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was measured, a row a setting."""
    return [
        (
            name,
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.1f}",
            f"{row['bytes'] / row['float_bytes']:.3f}",
            str(row["layers"]),
            f"{row['kernels']['integer']}/{row['kernels']['float']}",
            f"{row['flipped']:.1f}",
            f"{row['outputs']['defended']['cosine']:.4f}",
            f"{row['outputs']['nearest']['cosine']:.4f}",
            f"{row['latency_ms']['float']:.1f}",
            f"{row['latency_ms']['defended']:.1f}",
        )
        for name, row in document["rows"].items()
    ]


if __name__ == "__main__":
    main()
