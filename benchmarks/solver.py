"""How fast the solver is: against the paper's, as the problem grows, and against what the machine can do.

    python benchmarks/solver.py [--quick] [--only PART …] [--device cuda]

Parts: limit (products and sweeps against torch.mm of the same shapes), speed (coordinate and relaxed on the same
model, data and grid), growth (images, depth, width), memory (peaks under --memory), relaxed (ResNet-20 at the paper's
full steps; half an hour and more). For speed, `relaxed` is run for STEPS steps of every layer and for one, and scaled
linearly to 10,000 (--quick: 100 steps, every run once). On a CPU every run is a process of its own, so that its peak
memory is its own; on a GPU, where memory can be asked for, one process does them all, and of several runs the first
one, which compiles kernels, is told apart. Needs CIFAR-10 (see common.py). Writes results/solver.json, on a GPU
results/solver-cuda.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import efrapq
from benchmarks.common import (
    RESULTS,
    Network,
    cifar10,
    fitted_exponent,
    imagenet_mobilenet,
    machine,
    native,
    peak_memory,
    resnet20,
    save,
    shared_folder,
    show,
    untrained,
)
from efrapq.rounding import exact_integers, factorize
from efrapq.rounding.coordinate import _sweep
from efrapq.rounding.gram import gram_, gram_codes_

PAPER_STEPS = 10_000
STEPS, QUICK_STEPS = 500, 100
# What defend counts of a layer's rows, for each of its inputs.
ROWS = 32
NETWORKS = ("resnet20", "resnet18-cifar", "vgg16-bn-cifar", "mobilenetv2-cifar", "imagenet-mobilenetv2")
AGAINST = ("images", "rows", "depth", "width")
# glibc gives blocks past 32 MiB back to the system at every free and takes them again, page by page: four fifths of a
# step of `relaxed` on large images. It is told to keep them where `relaxed` is timed, so that the ratios hold against
# its arithmetic; `coordinate`, which works in chunks, is timed as a user gets it.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
TITLES = {"resnet18-cifar": "ResNet-18", "vgg16-bn-cifar": "VGG-16-BN", "mobilenetv2-cifar": "MobileNetV2"}


def network(name: str, folder: Path, width: float | None = None) -> Network:
    """A network by name, with published weights where there are any."""
    if name == "resnet20" and width is None:
        return resnet20(folder)
    if name == "imagenet-mobilenetv2":
        return imagenet_mobilenet(folder)
    return untrained(name, TITLES.get(name, name), cifar10(folder, "train", 1), width=width)


@functools.cache
def prepared(name: str, width: float | None) -> Network:
    """`network`, from the development data, kept for the next run of this process."""
    folder = shared_folder()
    assert folder is not None
    return network(name, folder, width)


def run_one(spec: dict[str, Any]) -> dict[str, Any]:
    """Defend once, in this process."""
    found = prepared(spec["network"], spec.get("width"))
    own = not isinstance(found.model, Path)
    on_gpu = spec.get("device", "cpu") != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    made = efrapq.defend(
        found.model,
        None,
        calib=found.data,
        preprocess=found.preprocess,
        input_shape=found.input_shape if own else None,
        calib_size=spec["images"],
        bits=spec["bits"],
        target=native(),
        device=spec.get("device", "cpu"),
        **spec.get("options", {}),
    )
    layers = made.evidence["layers"]
    return {
        "seconds": time.perf_counter() - started,
        "pass": made.evidence["timing"]["pass"],
        "memory": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "flipped": made.evidence["flipped"],
        "losses": {layer["name"]: layer["loss"] for layer in layers},
        "weights": sum(math.prod(layer["shape"]) for layer in layers),
        "codes": made.quantized.digest,
        "origin": found.origin,
        "title": found.name,
    }


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the shortest pass, and the passes of all."""
    passes = [seconds for run in runs for seconds in run.get("passes", [run["pass"]])]
    return min(runs, key=lambda run: float(run["pass"])) | {"passes": passes}


def separately(repeat: int = 1, **spec: Any) -> dict[str, Any]:
    """`run_one` in a process of its own, or in this one on a GPU; of several runs the one with the shortest pass.

    spec["within"]: how often the process does it.
    """
    if spec.get("device", "cpu") != "cpu":
        runs = [run_one(spec) for _ in range(repeat)]
        return fastest(runs) | {"first_pass": runs[0]["pass"]}
    runs = []
    environment = dict(os.environ)
    if spec.get("options", {}).get("solver") == "relaxed":
        environment |= KEEPS_MEMORY
    for _ in range(repeat):
        command = [sys.executable, __file__, "--one", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{spec}: {done.stderr}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return fastest(runs)


def speed(document: dict[str, Any], networks: tuple[str, ...], steps: int, device: str, repeat: int) -> None:
    """coordinate against relaxed. repeat: runs of coordinate, of which the fastest counts."""
    rows = []
    for name in networks:
        images = 256 if name == "imagenet-mobilenetv2" else 512
        runs = {}
        for bits in (4, 8):
            runs[bits] = separately(network=name, images=images, bits=bits, repeat=repeat, device=device)
            document.setdefault("speed", {})[f"{name} W{bits}A8"] = {"coordinate": runs[bits], "relaxed": {}}
            save(document["name"], document)
        # A step costs the same at any width of the codes: measured once, at 4 bits.
        options = {"solver": "relaxed"}
        one, many = (
            separately(network=name, images=images, bits=4, options=options | {"steps": n}, device=device)
            for n in (1, steps)
        )
        step = (many["pass"] - one["pass"]) / (steps - 1)
        paper = {"step": step, "pass": one["pass"] + (PAPER_STEPS - 1) * step, "measured": many["pass"]}
        paper["seconds"] = one["seconds"] - one["pass"] + paper["pass"]
        for bits, ours in runs.items():
            document["speed"][f"{name} W{bits}A8"]["relaxed"] = paper
            save(document["name"], document)
            rows.append(
                (
                    f"{ours['title']} W{bits}A8",
                    f"{ours['weights'] / 1e6:.2f} M",
                    images,
                    f"{ours['seconds']:.1f} s",
                    f"{ours['pass']:.1f} s",
                    f"{paper['pass']:,.0f} s",
                    f"{paper['seconds'] / ours['seconds']:,.0f}×",
                    f"{paper['pass'] / ours['pass']:,.0f}×",
                    f"{ours['memory'] / 2**30:.2f} GiB",
                )
            )
    header = (
        "network",
        "weights",
        "images",
        "defend",
        "its pass",
        "relaxed's pass",
        "ratio",
        "of passes",
        "peak memory",
    )
    show(f"speed: relaxed from {steps} steps a layer, scaled to {PAPER_STEPS:,}", header, rows)


def growth(document: dict[str, Any], quick: bool, against: tuple[str, ...]) -> None:
    """Time of the pass against images, depth and width."""
    repeat = 1 if quick else 2
    tables: dict[str, tuple[str, list[float], Callable[[float], dict[str, Any]]]] = {
        "images": (
            "ResNet-20, calibration images",
            [64, 512] if quick else [64, 128, 256, 512, 1024, 2048, 4096],
            lambda n: separately(network="resnet20", images=int(n), bits=4, within=1 if quick else 5),
        ),
        "rows": (
            "ResNet-20, calibration images, every row of H counted",
            [64, 128, 256, 512, 1024, 2048, 4096],
            lambda n: separately(network="resnet20", images=int(n), bits=4, within=3, options={"rows": 1 << 20}),
        ),
        "depth": (
            "ResNets for CIFAR, weight layers, 512 images",
            [20, 56] if quick else [20, 32, 56, 110],
            lambda n: separately(network=f"resnet{int(n)}", width=16, images=512, bits=4, repeat=1 if quick else 3),
        ),
        "width": (
            "ResNet-20, width times 16, 512 images",
            [1, 2, 4],
            lambda n: separately(network="resnet20", width=16 * n, images=512, bits=4, repeat=repeat),
        ),
    }
    for key in against:
        title, sizes, run = tables[key]
        runs = [run(size) for size in sizes]
        seconds = [r["pass"] for r in runs]
        # Seconds that differ by a factor of ten are measured with errors that do so, too.
        slope, intercept = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
        line = [slope * s + intercept for s in sizes]
        exponent = fitted_exponent(sizes, seconds)
        document.setdefault("growth", {})[key] = {
            "title": title,
            "sizes": sizes,
            "seconds": seconds,
            "passes": [r["passes"] for r in runs],
            "memory": [r["memory"] for r in runs],
            "exponent": exponent,
            "line": [float(slope), float(intercept)],
            "off_the_line": max(abs(a - b) / b for a, b in zip(seconds, line, strict=True)),
        }
        save(document["name"], document)
        rows = [(int(s), f"{t:.2f}", f"{v:.2f}") for s, t, v in zip(sizes, seconds, line, strict=True)]
        show(f"{title}: exponent {exponent:.2f}", (key, "seconds of the pass", "straight line"), rows)


def memory(document: dict[str, Any], quick: bool) -> None:
    """Peak memory and time under a limit; the codes must not change."""
    name, images = ("resnet20", 512) if quick else ("imagenet-mobilenetv2", 256)
    rows = []
    codes = set()
    for limit_mib in (64 << 10, 64) if quick else (64 << 10, 2048, 512, 64):
        found = separately(network=name, images=images, bits=4, options={"memory": limit_mib << 20})
        codes.add(found["codes"])
        document.setdefault("memory", {})[str(limit_mib)] = found
        word = "none" if limit_mib >= 64 << 10 else f"{limit_mib} MiB"
        rows.append((word, f"{found['memory'] / 2**30:.2f} GiB", f"{found['pass']:.1f} s", found["codes"][:12]))
    document["memory"]["same_codes"] = len(codes) == 1
    save(document["name"], document)
    header = ("--memory", "peak of the process", "pass", "codes")
    show(f"memory: {name}, {images} images, codes {'identical' if len(codes) == 1 else 'DIFFER'}", header, rows)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one run, until the device has done it."""
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best_of(work: Callable[[], object], device: str, repeat: int = 3) -> float:
    """The shortest of several times after a first one, seconds."""
    return min([timed(work, device) for _ in range(repeat + 1)][1:])


def limit(document: dict[str, Any], sizes: tuple[int, ...], device: str) -> None:
    """Achieved GFLOP/s of the accumulation of H and of a sweep, counted as the plain products they replace."""
    rows = []
    for size in sizes:
        outputs, count = size // 9, min(ROWS * size, 8192)
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8).to(device)
        x = codes.float()[None] / 255
        wide = torch.randn(size, outputs, generator=generator).to(device)
        H = x.transpose(1, 2) @ x / count
        total = torch.zeros(1, size, size, dtype=torch.float64, device=device)
        gram = 2 * count * size * size
        sweep = 2 * outputs * size * size
        plain_gram = gram / best_of(lambda x=x: x[0].t() @ x[0], device)
        ours_real = gram / best_of(lambda t=total, x=x: gram_(t, x), device)
        ours_codes = None
        if device == "cpu" and exact_integers():
            ours_codes = gram / best_of(lambda t=total, c=codes: gram_codes_(t[0], c, 3), device)
        plain_sweep = sweep / best_of(lambda H=H, w=wide: H[0] @ w, device)
        scale = torch.full((1, 1, outputs), 0.1, device=device)
        curvature = (scale.square() * H.diagonal(dim1=1, dim2=2)[..., None]).expand(1, size, outputs).contiguous()
        times = []
        for _ in range(6):
            up = (torch.rand(1, size, outputs, generator=generator) < 0.5).to(device)
            R = H @ (up * 0.1 - 0.05)
            arguments = (R, H, scale, up, torch.zeros_like(R), curvature, 256)
            times.append(timed(lambda arguments=arguments: _sweep(*arguments), device))
        ours_sweep = sweep / min(times[1:])
        factor = best_of(lambda H=H, w=wide: factorize(H.double(), w.t()[None].double()), device, 1)
        document.setdefault("limit", {})[str(size)] = {
            "mm_gram": plain_gram,
            "gram": ours_real,
            "gram_codes": ours_codes,
            "mm_sweep": plain_sweep,
            "sweep": ours_sweep,
            "factor_seconds": factor,
        }
        save(document["name"], document)
        best = max(ours_real, ours_codes or 0.0)
        rows.append(
            (
                f"{size} × {outputs}",
                f"{plain_gram / 1e9:.0f}",
                f"{ours_real / 1e9:.0f}",
                "–" if ours_codes is None else f"{ours_codes / 1e9:.0f}",
                f"{100 * best / plain_gram:.0f} %",
                f"{plain_sweep / 1e9:.0f}",
                f"{ours_sweep / 1e9:.0f}",
                f"{100 * ours_sweep / plain_sweep:.0f} %",
                f"{factor:.2f} s",
            )
        )
    header = ("D × O", "mm", "H, reals", "H, codes", "share", "mm", "sweep", "share", "factor")
    show("limit: GFLOP/s, counted as plain products", header, rows)


def relaxed(document: dict[str, Any]) -> None:
    """ResNet-20 at the paper's full steps, beside ours at no smaller a share of flipped weights."""
    spec: dict[str, Any] = {"network": "resnet20", "images": 512, "bits": 4}
    path = RESULTS / "relaxed_resnet20.json"
    paper = json.loads(path.read_text()) if path.exists() else separately(**spec, options={"solver": "relaxed"})
    save(path.stem, paper)
    rows = [("relaxed, 10,000 steps", f"{paper['flipped']:.1f}", f"{_mean(paper):.4g}", "", f"{paper['pass']:.0f} s")]
    for fidelity in (1.1, 1.25, 1.5, 2.0):
        ours = separately(**spec, options={"fidelity": fidelity})
        lower = sum(ours["losses"][name] <= loss for name, loss in paper["losses"].items())
        document.setdefault("relaxed", {})[str(fidelity)] = ours | {"layers_lower": lower}
        rows.append(
            (
                f"coordinate, fidelity {fidelity:g}",
                f"{ours['flipped']:.1f}",
                f"{_mean(ours):.4g}",
                f"{lower} of {len(paper['losses'])}",
                f"{ours['pass']:.1f} s",
            )
        )
    save(document["name"], document)
    header = ("ResNet-20 W4A8, 512 images", "flipped %", "L_A", "layers no higher", "pass")
    show("L_A after the paper's full steps (geometric mean over layers)", header, rows)


def _mean(run: dict[str, Any]) -> float:
    return math.exp(sum(math.log(v) for v in run["losses"].values()) / len(run["losses"]))


def main() -> None:
    parts = ("limit", "speed", "growth", "memory", "relaxed")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 only, small growth tables; minutes")
    parser.add_argument("--only", nargs="+", choices=parts)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--growth", nargs="+", choices=AGAINST, default=AGAINST, help="against what")
    parser.add_argument("--steps", type=int, help=f"of relaxed, a layer: {STEPS}, --quick {QUICK_STEPS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: limit and speed only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        spec = json.loads(args.one)
        print(json.dumps(fastest([run_one(spec) for _ in range(spec.pop("within", 1))])))
        return
    if shared_folder() is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED to the folder with CIFAR-10 and the published models")
    suffix = ("-quick" if args.quick else "") + ("" if args.device == "cpu" else f"-{args.device}")
    path = RESULTS / f"solver{suffix}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    document |= {"name": path.stem, "machine": machine()}
    chosen = args.only or (parts[:2] if args.device != "cpu" else parts[:4] if args.quick else parts)
    if "limit" in chosen:
        limit(document, (576, 1152) if args.quick else (144, 576, 1152, 2304, 4608), args.device)
    if "speed" in chosen:
        networks = ("resnet20",) if args.quick else tuple(args.networks)
        steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
        speed(document, networks, steps, args.device, 1 if args.quick else 2)
    if "growth" in chosen:
        growth(document, args.quick, tuple(a for a in args.growth if not (args.quick and a in ("rows", "width"))))
    if "memory" in chosen:
        memory(document, args.quick)
    if "relaxed" in chosen:
        relaxed(document)


if __name__ == "__main__":
    main()
