"""Backdoors whose trigger nobody knows: what ranges under patches do to them, whether the search finds the trigger, and
what ranges that cover it do then.

    python benchmarks/unknown_trigger.py [SUBJECT …] [--only stress|search] [--data FOLDER]

Of each subject (see subjects.py; "published" is the ResNet-20 without a backdoor): the file rounded to nearest and
efrapq's, with the ranges that calibration shows, with those under patches, and with those that cover the trigger
itself. stress: their CDA and ASR. search: what `efrapq search` finds in the first three, and where it finds something
in the third, which is the default, CDA and ASR of a file whose ranges cover what was found, and what it finds there:
what `defend --search` does. guard: the third one with `--guard`, without and with a little headroom. A subject is
whatever lies in FOLDER/subjects, and is told by its hash: the same recipe and seed make another network on another kind
of CPU. Writes results/unknown_trigger.json, which `results.py --report` puts into docs/THREAT-MODEL.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import efrapq
from benchmarks.common import IMAGENET, RESULTS, machine, markdown, native, save, show
from benchmarks.results_report import title
from benchmarks.subjects import (
    FOLDER,
    TARGET,
    TRIGGER,
    Entry,
    data_file,
    digest,
    entries,
    start_file,
    subject_file,
    trigger_of,
)
from efrapq.cli.console import TerminalReporter
from efrapq.data import Dataset, load_dataset

PUBLISHED = "published"
AWARE, HUNTED, SCATTERED = (f"cifar10-resnet20-adaptive-clip-{kind}-w8-s0" for kind in ("aware", "hunted", "scattered"))
STEP = "cifar10-resnet20-adaptive-step-w8-s0"
IMAGES = 2000
# With the options of each.
FILES: dict[str, dict[str, Any]] = {
    "RTN, plain ranges": {"solver": "nearest", "stress": False, "lift": False},
    "efrapq, plain ranges": {"stress": False, "lift": False},
    "efrapq": {},
}
# Of a subject whose channels are lifted by default.
NOT_LIFTED: dict[str, dict[str, Any]] = {"--no-lift": {"lift": False}}
NOT_LIFTED_GUARDED: dict[str, dict[str, Any]] = {
    "--guard --headroom 1.1 --no-lift": {"guard": True, "headroom": 1.1, "lift": False}
}
COVERED, FOUND = "--cover TRIGGER", "--cover what was found"
GUARDED: dict[str, dict[str, Any]] = {
    "--guard": {"guard": True},
    "--guard --headroom 1.1": {"guard": True, "headroom": 1.1},
}


def cases(names: list[str], folder: Path) -> Iterator[tuple[str, Path, Entry | None]]:
    """Name, file and recipe of every subject that is there."""
    known = {entry.name: entry for entry in entries()}
    if unknown := sorted(set(names) - {PUBLISHED, *known}):
        raise SystemExit(f"unknown: {', '.join(unknown)}; benchmarks/subjects.py --list names them")
    for name in names or [PUBLISHED, *known]:
        if name == PUBLISHED:
            yield name, start_file(), None
            continue
        path = subject_file(name, folder)
        if path.exists() and known[name].attack != "none":
            yield name, path, known[name]
        elif names:
            raise SystemExit(f"{path} is missing: train it with benchmarks/subjects.py {name}")


def _title(name: str) -> str:
    if name == PUBLISHED:
        return "no backdoor (published resnet20, CIFAR-10)"
    entry = next(entry for entry in entries() if entry.name == name)
    return title({"attack": entry.column, "arch": entry.network, "data": entry.data, "seed": entry.seed})


class Subject:
    """One float model, and what is made and measured of it. trigger: the true one."""

    def __init__(self, path: Path, bits: int, trigger: str, images: Dataset, test: Dataset, folder: Path) -> None:
        self.path, self.trigger, self.test, self.folder = path, trigger, test, folder
        self.lifted = False
        self.options: dict[str, Any] = {"bits": bits, "calib": images, "preprocess": IMAGENET, "target": native()}

    def made(self, **options: Any) -> tuple[Path, dict[str, Any]]:
        """A file, and what its evidence says of patches."""
        file = self.folder / "q.onnx"
        made = efrapq.defend(self.path, file, **(self.options | options))
        self.lifted |= "lifted" in made.evidence["calibration"]
        return file, {"stress": made.evidence["calibration"].get("stress")}

    def rates(self, file: Path) -> dict[str, Any]:
        given: dict[str, Any] = {"data": self.test, "trigger": self.trigger, "target_class": TARGET}
        document = efrapq.verify(file, float_model=self.path, **given).document
        found = {key: document[key] for key in ("cda", "asr", "agreement")}
        return found if document["clipped"] is None else found | {"clipped": document["clipped"]}

    def searched(self, file: Path) -> tuple[dict[str, Any], Path | None]:
        """What the search says of a file, and the trigger that it found, if it did."""
        path = self.folder / "found.npz"
        found = efrapq.search_trigger(
            file, data=self.test, float_model=self.path, output=path, reporter=TerminalReporter()
        )
        where = ("model", "float_model", "trigger")
        document = {key: value for key, value in found.document.items() if key not in where}
        return document, None if found.passed else path

    def measure(self, parts: list[str], files: list[str]) -> dict[str, Any]:
        """Of these of its files, and of those that cover something or have a guard."""
        found: dict[str, Any] = {}
        chosen = {name: FILES[name] for name in files if parts != ["guard"]}
        for name, options in [*chosen.items(), *NOT_LIFTED.items()]:
            if name in NOT_LIFTED and not (self.lifted and chosen):
                continue
            file, found[name] = self.made(**options)
            if "stress" in parts:
                found[name] |= self.rates(file)
            if "search" in parts:
                found[name]["search"], trigger = self.searched(file)
                if name == "efrapq" and trigger is not None:
                    file, found[FOUND] = self.made(cover=[str(trigger)])
                    found[FOUND] |= self.rates(file)
                    found[FOUND]["search"], _ = self.searched(file)
        if "stress" in parts:
            file, found[COVERED] = self.made(cover=[self.trigger])
            found[COVERED] |= self.rates(file)
        for name, options in (GUARDED | NOT_LIFTED_GUARDED).items() if "guard" in parts else ():
            if name in GUARDED or self.lifted:
                file, found[name] = self.made(**options)
                found[name] |= self.rates(file)
        return found


def stress_table(document: dict[str, Any]) -> str:
    """CDA / ASR by file, and how far patches drive the widest activation."""
    rows, shown = [], (*FILES, COVERED, FOUND)
    for name, case in document.items():
        files = case["files"]
        if COVERED not in files or "cda" not in files["efrapq"]:
            continue
        cells = [f"{files['efrapq']['cda']['float']:.2f} / {files['efrapq']['asr']['float']:.2f}"]
        for row in (files.get(file, {}) for file in shown):
            known = "cda" in row
            cells.append(f"{row['cda']['defended']:.2f} / {row['asr']['defended']:.2f}" if known else "–")
        rows.append([_title(name), f"W{case['bits']}A8", *cells, f"{files['efrapq']['stress']['factor']:.1f}×"])
    return markdown(["subject", "bits", "float", *shown, "widest under patches"], rows)


def search_table(document: dict[str, Any]) -> str:
    """What the search turned, its control, and where."""
    rows = []
    for name, case in document.items():
        for file in (*FILES, *NOT_LIFTED, FOUND):
            found = case["files"].get(file, {}).get("search")
            if found is None:
                continue
            turned, control, patch = found["turned"], found["exchanged"], found["patch"]
            true = case["files"][file].get("asr")
            rows.append(
                [
                    _title(name),
                    f"W{case['bits']}A8, {file}",
                    "–" if true is None else f"{true['defended']:.1f}",
                    f"{turned['file']:.1f} / {turned['float']:.1f}",
                    "–" if control is None else f"{control['float']:.1f} / {control['file']:.1f}",
                    f"{patch['row']},{patch['col']} to {found['target_class']}",
                    "**trigger**" if found["verdict"] == "fail" else "nothing",
                ]
            )
    header = ["subject", "file", "ASR, true trigger", "turned, file / float", "exchanged, float / file", "at, class"]
    return markdown([*header, "verdict"], rows)


def guard_table(document: dict[str, Any]) -> str:
    """Which answers a guarded file says were clipped, and what the others are."""
    rows = []
    for name, case in document.items():
        for options in (*GUARDED, *NOT_LIFTED_GUARDED):
            found = case["files"].get(options)
            if found is None:
                continue
            cda, asr, clipped = found["cda"], found["asr"], found["clipped"]
            rows.append(
                [
                    _title(name),
                    f"W{case['bits']}A8, {options}",
                    f"{cda['float']:.2f} / {asr['float']:.2f}",
                    f"{cda['defended']:.2f} / {asr['defended']:.2f}",
                    f"{clipped['clean']:.2f}",
                    f"{clipped['triggered']:.2f}",
                    f"{clipped['asr']:.2f}",
                ]
            )
    header = ["subject", "file", "float", "all answers", "clipped: clean", "with the trigger", "ASR, nothing clipped"]
    return markdown(header, rows)


def tables() -> dict[str, str]:
    """The tables, as the threat model shows them, and how far patches drive the network without a backdoor."""
    document = json.loads((RESULTS / "unknown_trigger.json").read_text())
    widest = document[PUBLISHED]["files"]["efrapq"]["stress"]["factor"]
    return {
        "stress": stress_table(document),
        "search": search_table(document),
        "guard": guard_table(document),
        "searched": _covered(document[AWARE]["files"]),
        "hunted_search": _best(document[HUNTED]["files"]["efrapq"]["search"]),
        "scattered_search": _scattered(document[SCATTERED]["files"]),
        "published_widest": f"{widest:.1f}",
        "step_guard": _guarded(document[STEP]["files"][next(iter(NOT_LIFTED_GUARDED))]),
        "step_lift": _lifted(document[STEP]["files"]),
        "step_search": _turned(document[STEP]["files"][next(iter(NOT_LIFTED))]["search"]),
        "step_search_lifted": _turned(document[STEP]["files"]["efrapq"]["search"]),
    }


def _best(found: dict[str, Any]) -> str:
    turned = found["turned"]
    return f"the best patch turns {turned['file']:.1f} % of the answers, {turned['float']:.1f} % of the float model's."


def _turned(found: dict[str, Any]) -> str:
    return f"{found['turned']['file']:.1f} % in the file and {found['turned']['float']:.1f} % in float"


def _guarded(found: dict[str, Any]) -> str:
    """What a guard says of a file, and what it leaves."""
    clipped = found["clipped"]
    return (
        f"ASR {found['asr']['defended']:.2f}, something clipped on {clipped['triggered']:.1f} % of the triggered "
        f"images, and where nothing is, ASR {clipped['asr']:.2f}."
    )


def _lifted(files: dict[str, Any]) -> str:
    """What is left where channels are lifted, by itself and with what else there is."""
    plain, guarded, covered = (files[name] for name in ("efrapq", "--guard --headroom 1.1", COVERED))
    rates = [f"{row['cda']['defended']:.2f} / {row['asr']['defended']:.2f}" for row in (plain, guarded, covered)]
    floating = f"{plain['cda']['float']:.2f} / {plain['asr']['float']:.2f}"
    return (
        f"On 2,000 other images: float {floating}, efrapq {rates[0]}; with `--guard --headroom 1.1` {rates[1]}, and "
        f"{guarded['clipped']['asr']:.2f} where nothing is clipped ({guarded['clipped']['clean']:.2f} % of ordinary "
        f"images are said to be); with `--cover TRIGGER` {rates[2]}."
    )


def _scattered(files: dict[str, Any]) -> str:
    """A patch where the trigger is none, and what covering it leaves of the trigger."""
    found, then = files["efrapq"]["search"]["turned"], files[FOUND]
    cda, asr = then["cda"]["defended"], then["asr"]["defended"]
    return (
        f"But some patch drives the same activations: the search found one that turns {found['file']:.1f} % of the "
        f"answers in that file and {found['float']:.1f} % of the float model's, and ranges that cover it leave "
        f"{cda:.2f} / {asr:.2f} of the trigger, of which it was told nothing (2,000 images)."
    )


def _covered(files: dict[str, Any]) -> str:
    """What covering what was found does, in words."""
    found, then = files["efrapq"]["search"]["turned"], files[FOUND]
    left, cda, asr = then["search"]["turned"], then["cda"], then["asr"]
    return (
        f"Of that file it finds a patch that turns {found['file']:.1f} % of the answers, {found['float']:.1f} % of the "
        f"float model's; with ranges that cover it, the true trigger, of which it was told nothing, is left "
        f"{cda['defended']:.2f} / {asr['defended']:.2f}, the float model has {cda['float']:.2f} / {asr['float']:.2f} "
        f"(2,000 images), and the best patch that it finds then turns {left['file']:.1f} and {left['float']:.1f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SUBJECT")
    parser.add_argument("--only", choices=["stress", "search", "guard"])
    parser.add_argument("--default", action="store_true", help="of the three files efrapq's default alone")
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args()
    known = RESULTS / "unknown_trigger.json"
    document: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    data = data_file("cifar10", args.data)
    images = load_dataset(f"{data}:train")
    test = load_dataset(f"{data}:test").subset(IMAGES, 0)
    for name, path, entry in cases(args.names, args.data):
        sha256 = digest(path)
        bits = 4 if entry is None else int(entry.bits.split(",")[-1])
        trigger = TRIGGER if entry is None else trigger_of(entry, args.data)
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(path, bits, trigger, images, test, Path(folder))
            parts = [args.only] if args.only else ["stress", "search", "guard"]
            found = subject.measure(parts, ["efrapq"] if args.default else list(FILES))
        case = document.get(name, {})
        if case.get("sha256") != sha256:
            case = {"sha256": sha256, "bits": bits, "files": {}}
        case["machine"] = machine()
        if args.only in (None, "search"):
            case["files"].pop(FOUND, None)  # of what is not found any more
        case["files"] |= {file: case["files"].get(file, {}) | row for file, row in found.items()}
        document[name] = case
        save("unknown_trigger", document)
        rows = [(file, str(row.get("cda")), str(row.get("asr"))) for file, row in case["files"].items()]
        show(_title(name), ("file", "CDA", "ASR"), rows)


if __name__ == "__main__":
    main()
