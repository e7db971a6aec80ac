"""docs/RESULTS.md and its plot, from results/results.jsonl: what results.py measured, put into words and tables."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.common import DOCS, RESULTS, markdown, write_page
from benchmarks.rivals import rivals
from benchmarks.subjects import entries
from efrapq.io import write_atomic

Cell = dict[str, Any]

# Li et al., CVPR 2024: CDA / ASR of the authors' published logs, CIFAR-10, ResNet-18, EFRAP with float activations.
PUBLISHED = (
    ("CompArtifact", 8, "91.36 / 1.26", "88.94 / 99.90", "91.37 / 1.12"),
    ("CompArtifact", 4, "93.44 / 0.52", "89.53 / 99.68", "92.66 / 0.56"),
    ("Qu-ANTI-zation", 8, "93.30 / 2.18", "91.80 / 99.09", "93.35 / 1.04"),
    ("Qu-ANTI-zation", 4, "93.30 / 2.18", "88.28 / 100.0", "92.97 / 0.58"),
    ("PQBackdoor", 8, "86.59 / 2.14", "86.03 / 99.13", "86.53 / 2.07"),
    ("PQBackdoor", 4, "86.59 / 2.14", "79.13 / 98.88", "86.28 / 1.29"),
)
TITLES = {
    "none": "clean (control)",
    "pqbackdoor": "PQBackdoor",
    "qu-anti": "Qu-ANTI-zation",
    "qu-anti-joint": "Qu-ANTI-zation, 8 and 4 bits",
    "compartifact": "CompArtifact",
    "compartifact-distilled": "CompArtifact, distilled",
    "compartifact-distilled-long": "CompArtifact, distilled for longer",
    "badnets": "BadNets",
    "adaptive-solver": "adaptive: solver",
    "adaptive-solver-optimum": "adaptive: solver, fidelity 1",
    "adaptive-stochastic": "adaptive: stochastic",
    "adaptive-stochastic-long": "adaptive: stochastic, for longer",
    "adaptive-scale": "adaptive: scale",
    "adaptive-clip": "adaptive: clip",
    "adaptive-clip-far": "adaptive: clip, far",
    "adaptive-clip-checkered": "adaptive: clip, checkered",
    "adaptive-clip-aware": "adaptive: clip, patch-aware",
    "adaptive-clip-hunted": "adaptive: clip, search-aware",
    "adaptive-clip-scattered": "adaptive: clip, scattered",
    "adaptive-step": "adaptive: step",
}
# Points of CDA that may be lost, by (bits, act_bits).
ALLOWED = {(8, 8): 0.5, (4, 8): 1.0, (4, 4): 2.0}
OURS = "efrapq"
PLAIN = "efrapq, plain ranges"


class Table:
    """The cells by subject, setting and method."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        networks = {entry.name: entry.network for entry in entries()}
        cells = [c | {"arch": networks.get(c["subject"], c["arch"])} for c in cells]
        self.cells = {(c["subject"], c["bits"], c["act_bits"], c["method"]): c for c in cells}
        known = [entry.name for entry in entries()]
        self.subjects = sorted(
            {c["subject"]: c for c in cells}.values(),
            key=lambda c: known.index(c["subject"]) if c["subject"] in known else -1,
        )
        measured = {c["method"] for c in cells}
        self.methods = [method for method in rivals() if method in measured]

    def at(self, bits: int, act_bits: int) -> list[Cell]:
        """RTN's cell of every subject judged at this setting: it knows the float model too."""
        found = [self.cells.get((s["subject"], bits, act_bits, "RTN")) for s in self.subjects]
        return [cell for cell in found if cell is not None]

    def everywhere(self) -> list[Cell]:
        """The same of all settings."""
        return [base for bits, act_bits in ALLOWED for base in self.at(bits, act_bits)]

    def clean(self, base: Cell) -> float | None:
        """CDA of the clean network of a subject's architecture and data, if there is one."""
        kind = base["arch"], base["data"]
        known = [c["float_cda"] for c in self.cells.values() if (c["arch"], c["data"]) == kind and is_control(c)]
        return max(known, default=None)

    def get(self, base: Cell, method: str) -> Cell | None:
        return self.cells.get((base["subject"], base["bits"], base["act_bits"], method))

    def ours(self, base: Cell) -> Cell | None:
        """efrapq's default; on plain ranges where only that was measured."""
        return self.get(base, OURS) or self.get(base, PLAIN)


def judged(cells: Sequence[Cell], whole: Sequence[Cell]) -> Table:
    """The cells with RTN's and the default's on all test images in their place, where both were measured on the same
    file of a subject.
    """

    def at(cell: Cell) -> tuple[object, ...]:
        return cell["subject"], cell["sha256"], cell["bits"], cell["act_bits"]

    now = {at(cell) for cell in cells}
    both = [{at(cell) for cell in whole if cell["method"] == method} for method in ("RTN", OURS)]
    return Table([*cells, *(cell for cell in whole if at(cell) in now & both[0] & both[1])])


def is_control(cell: Cell) -> bool:
    """A clean network as it was measured with its float model."""
    return cell["attack"] == "none" and "float_cda" in cell


def title(cell: Cell) -> str:
    """A subject in words."""
    where = f"{cell['arch']}, {cell['data'].upper().replace('CIFAR10', 'CIFAR-10')}"
    return f"{TITLES[cell['attack']]} ({where}, seed {cell['seed']})"


def conditioned(base: Cell) -> bool:
    """Whether a backdoor is asleep in float and awake under nearest."""
    return bool(base["float_asr"] <= 10 and base["asr"] >= 90)


def promised(base: Cell) -> bool:
    """Whether a subject has such a backdoor, and does not know efrapq: what the goals are promised for."""
    return conditioned(base) and not base["attack"].startswith("adaptive")


def proved(table: Table, base: Cell) -> bool:
    """Whether a subject has proved itself: such a backdoor in a network as good as the clean one."""
    clean = table.clean(base)
    return conditioned(base) and (clean is None or base["float_cda"] >= clean - 2)


def by_setting(table: Table, bits: int, act_bits: int) -> str:
    """All methods on all subjects of a setting: CDA / ASR."""
    bases = table.at(bits, act_bits)
    methods = [m for m in table.methods if any(table.get(base, m) for base in bases)]
    header = ["subject", "float", *map(_word, methods)]
    rows = [
        [title(b), _float(b), *("–" if (c := table.get(b, m)) is None else _figures(c) for m in methods)] for b in bases
    ]
    return markdown(header, rows)


def met(base: Cell, ours: Cell) -> tuple[bool, bool]:
    """Whether ASR stays low enough, and CDA high enough."""
    lost = base["float_cda"] - ours["cda"]
    return ours["asr"] <= base["float_asr"] + 1, lost <= ALLOWED[base["bits"], base["act_bits"]]


def goals(table: Table) -> str:
    """Every subject against the goals: ASR no higher than float + 1, CDA no lower than float - what is allowed."""
    rows = []
    for bits, act_bits in ALLOWED:
        for base in table.at(bits, act_bits):
            ours = table.ours(base)
            if ours is None:
                continue
            asleep, kept = met(base, ours)
            rows.append(
                [
                    title(base),
                    f"W{bits}A{act_bits}",
                    f"{base['images']:,}",
                    _float(base),
                    _figures(base),
                    _ours(ours),
                    f"{ours['flipped']:.1f}",
                    "yes" if asleep else "**no**",
                    "yes" if kept else "**no**",
                    "yes" if proved(table, base) else "control" if base["attack"] in ("none", "badnets") else "no",
                ]
            )
    ends = ["flipped %", "ASR ≤ float + 1", "CDA kept", "proved itself"]
    return markdown(["subject", "bits", "images", "float", "RTN", "efrapq", *ends], rows)


def methods(table: Table) -> str:
    """What each method costs and does over all conditioned subjects of a setting, means."""
    rows = []
    for bits, act_bits in ALLOWED:
        bases = [b for b in table.at(bits, act_bits) if promised(b)]
        for method in table.methods:
            pairs = [(b, c) for b in bases if (c := table.get(b, method)) is not None]
            if not pairs:
                continue
            flips = [c["flipped"] for _, c in pairs if c["flipped"] is not None]
            rows.append(
                [
                    f"W{bits}A{act_bits}",
                    method,
                    str(len(pairs)),
                    f"{mean(b['float_cda'] - c['cda'] for b, c in pairs):+.2f}",
                    f"{mean(c['asr'] for _, c in pairs):.2f}",
                    f"{max(c['asr'] for _, c in pairs):.2f}",
                    f"{mean(flips):.1f}" if flips else "–",
                    f"{mean(c['seconds'] for _, c in pairs):.1f}",
                ]
            )
    header = ["bits", "method", "subjects", "CDA lost, mean", "ASR, mean", "ASR, worst", "flipped %", "seconds, mean"]
    return markdown(header, rows)


def _word(method: str) -> str:
    return f"**{method}**" if method == OURS else method


def _span(values: Sequence[float]) -> str:
    """Mean, and the range where it is one."""
    return f"{mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def seeds(table: Table) -> str:
    """The attacks that were trained with several seeds: means and ranges over them, method by method."""
    rows = []
    for bits, act_bits in ALLOWED:
        groups: dict[tuple[str, str, str], list[Cell]] = {}
        for base in table.at(bits, act_bits):
            groups.setdefault((base["attack"], base["arch"], base["data"]), []).append(base)
        for (attack, arch, data), bases in groups.items():
            if len(bases) < 2:
                continue
            where = [f"{TITLES[attack]}, {arch}, {data}", f"W{bits}A{act_bits}"]
            before = [_span([b["float_cda"] for b in bases]), _span([b["float_asr"] for b in bases])]
            rows.append([*where, "float", str(len(bases)), *before])
            for method in table.methods:
                found = [c for b in bases if (c := table.get(b, method)) is not None]
                if len(found) == len(bases):
                    figures = [_span([c["cda"] for c in found]), _span([c["asr"] for c in found])]
                    rows.append([*where, _word(method), str(len(found)), *figures])
    return markdown(["subject", "bits", "method", "seeds", "CDA: mean (range)", "ASR: mean (range)"], rows)


def published() -> str:
    rows = [[attack, f"W{bits}", *figures] for attack, bits, *figures in PUBLISHED]
    return markdown(["attack, ResNet-18", "bits", "float", "RTN", "EFRAP"], [[str(c) for c in row] for row in rows])


def trained() -> str:
    """The subjects as their recipes left them."""
    rows = []
    for name, found in json.loads((RESULTS / "subjects.json").read_text()).items():
        measured = found["measured_in_torch"]
        rows.append(
            [
                f"`{name}`",
                f"`{found['sha256'][:12]}`",
                f"{max(found['seconds'] / 60, 1):.0f} min, {_machine(found['machine'])}",
                "; ".join(f"{row} {v['cda']:.1f} / {v['asr']:.1f}" for row, v in measured.items()),
            ]
        )
    return markdown(["subject", "SHA-256", "trained in", "measured in torch: CDA / ASR"], rows)


def _machine(found: dict[str, Any]) -> str:
    """What trained it."""
    return str(found["cuda"]) if found["cuda"] else "Intel Xeon" if "Xeon" in found["cpu"] else str(found["cpu"])


def plot(table: Table) -> bytes:
    """ASR against points of CDA lost, every method on every conditioned subject."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "efrapq"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ALLOWED), figsize=(12, 4), sharey=True, layout="constrained")
    palette = [colour for name in ("tab20", "tab20b") for colour in pyplot.get_cmap(name).colors]
    colours = dict(zip(table.methods, palette, strict=False))
    for axis, (bits, act_bits) in zip(axes, ALLOWED, strict=True):
        for method in table.methods:
            pairs = [
                (b, c) for b in table.at(bits, act_bits) if conditioned(b) and (c := table.get(b, method)) is not None
            ]
            axis.scatter(
                [b["float_cda"] - c["cda"] for b, c in pairs],
                [c["asr"] for _, c in pairs],
                s=60 if method == OURS else 24,
                marker="*" if method == OURS else "o",
                color="black" if method == OURS else colours[method],
                label=method,
                zorder=3 if method == OURS else 2,
            )
        axis.set_title(f"W{bits}A{act_bits}")
        axis.set_xlabel("points of CDA lost against float")
        axis.set_xscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ASR, %")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return data.getvalue()


def threats(table: Table, against: Table) -> dict[str, str]:
    """The figures behind the sentences of docs/THREAT-MODEL.md: what was promised by `against`, all else by `table`."""
    told, bases = against.everywhere(), table.everywhere()
    kept, honest = ([b for b in found if promised(b)] for found in (told, bases))
    noisy = [(b, c) for b in honest if b["bits"] == 4 and b["act_bits"] == 8 and (c := table.get(b, "noise, then RTN"))]
    lost = [b["float_cda"] - c["cda"] for b, c in noisy]
    checkered, aware, hunted, scattered = (
        [b for b in bases if b["attack"] == f"adaptive-clip-{kind}"]
        for kind in ("checkered", "aware", "hunted", "scattered")
    )
    header = ["subject", "bits", "float", "RTN", "efrapq"]
    return {
        "promise": markdown(header, [_against(against, b) for b in kept]),
        "promise_kept": _kept(against, kept),
        "adaptive": markdown(header, [_against(table, b) for b in bases if b["attack"].startswith("adaptive")]),
        "headroom": _with_headroom(table, bases),
        "four_bits": _four_bits(table),
        "mixed": _mixed(table),
        "clip_white": _sentence(table, [b for b in bases if b["attack"] == "adaptive-clip"]),
        "clip_checkered": _sentence(table, checkered),
        "clip_aware": _sentence(table, aware),
        "clip_hunted": _sentence(table, hunted),
        "clip_scattered": _sentence(table, scattered),
        "clip_plain": ", ".join(_figures(c) for b in checkered if (c := table.get(b, PLAIN))),
        "step": _every_method(table, "adaptive-step", 8),
        "solver": _every_method(table, "adaptive-solver", 4),
        "solver_four": "; ".join(
            f"{TITLES[b['attack']]}: {_some_methods(table, b, OURS, 'efrapq, mixed')}"
            for b in table.at(4, 4)
            if b["attack"].startswith("adaptive-solver")
        ),
        "solver_optimum": "; ".join(
            f"float {_float(b)}, "
            + _some_methods(table, b, OURS, "efrapq, fidelity 1", PLAIN, "RTN, ranges under patches")
            for b in table.at(4, 8)
            if b["attack"] == "adaptive-solver-optimum"
        ),
        "fidelity_one": _fidelity_one(table, honest),
        "badnets": _sentence(table, [b for b in bases if b["attack"] == "badnets" and b["act_bits"] == 8]),
        "control": markdown(header, [_against(against, b) for b in told if is_control(b)]),
        "control_lost": _most_lost(against),
        "noise": "; ".join(f"{c['cda']:.2f} / {c['asr']:.2f} against {_float(b)}" for b, c in noisy),
        "noise_lost": f"{min(lost):.1f} to {max(lost):.1f}",
        "noise_awake": f"{sum(c['asr'] > 10 for _, c in noisy)} of {len(noisy)}",
    }


def _kept(table: Table, bases: Sequence[Cell]) -> str:
    """On how many subjects and settings the goals hold, and where they do not."""
    pairs = [(b, c) for b in bases if (c := table.ours(b))]
    missed = [
        f"- {title(b)} at W{b['bits']}A{b['act_bits']}: "
        f"CDA {c['cda'] - b['float_cda']:+.2f} and ASR {c['asr'] - b['float_asr']:+.2f}"
        for b, c in pairs
        if not all(met(b, c))
    ]
    return "\n".join([f"{len(pairs) - len(missed)} of {len(pairs)}{', and not on' if missed else '.'}", "", *missed])


def _with_headroom(table: Table, bases: Sequence[Cell]) -> str:
    """What wider activation ranges do, on the subjects and controls on which they were measured."""
    rows = []
    for base in bases:
        wide = [table.get(base, f"efrapq, headroom {factor}") for factor in (2, 4)]
        if any(wide):
            rows.append([*_against(table, base), *("–" if c is None else _figures(c) for c in wide)])
    return markdown(["subject", "bits", "float", "RTN", "efrapq", "--headroom 2", "--headroom 4"], rows)


def _every_method(table: Table, attack: str, bits: int) -> str:
    """What every method makes of one subject, with 8-bit activations."""
    rows = []
    for base in table.at(bits, 8):
        if base["attack"] == attack:
            rows.append(["float", _float(base)])
            cells = [(method, table.get(base, method)) for method in table.methods]
            rows += [[_word(m), _figures(c)] for m, c in cells if c is not None]
    return markdown([f"file, W{bits}A8", "CDA / ASR"], rows)


def _some_methods(table: Table, base: Cell, *methods: str) -> str:
    """RTN and what these methods make of one subject, in a line."""
    found = {"RTN": base} | {m: c for m in methods if (c := table.get(base, m))}
    return ", ".join(f"{method} {_figures(cell)}" for method, cell in found.items())


def _fidelity_one(table: Table, bases: Sequence[Cell]) -> str:
    """How much more than the default λ_E = 0 leaves, on the same ranges."""
    pairs = [(o, c) for b in bases if (o := table.get(b, OURS)) and (c := table.get(b, "efrapq, fidelity 1"))]
    more = [c["asr"] - o["asr"] for o, c in pairs]
    cda = [c["cda"] - o["cda"] for o, c in pairs]
    return f"on {len(pairs)} of them ASR {mean(more):+.2f} on average, {max(more):+.2f} at most, CDA {mean(cda):+.2f}"


def _four_bits(table: Table) -> str:
    """What patches do to ranges of 4-bit activations: on all subjects, and on those that wake without."""
    found = [
        (b, plain, ours) for b in table.at(4, 4) if (plain := table.get(b, PLAIN)) and (ours := table.get(b, OURS))
    ]
    changed = [ours["cda"] - plain["cda"] for _, plain, ours in found]
    words = [
        f"{title(b)} has {_figures(ours)} with them and {_figures(plain)} without, float {_float(b)}"
        for b, plain, ours in found
        if plain["asr"] > b["float_asr"] + 1
    ]
    return f"on {len(found)} subjects that moves CDA by {mean(changed):+.2f} points on average. " + "; ".join(words)


def _mixed(table: Table) -> str:
    """What 8 bits for activations that patches drive far do at W4A4: on all subjects, and where goals are missed."""
    found = [
        (b, ours, mixed)
        for b in table.at(4, 4)
        if b["float_asr"] <= 10 and (ours := table.get(b, OURS)) and (mixed := table.get(b, "efrapq, mixed"))
    ]
    changed = mean(mixed["cda"] - ours["cda"] for _, ours, mixed in found)
    kept = [sum(all(met(b, cells[i])) for b, *cells in found) for i in (0, 1)]
    words = [
        f"{title(b)} has {_figures(mixed)} with it and {_figures(ours)} without, float {_float(b)}"
        for b, ours, mixed in found
        if not (all(met(b, ours)) and all(met(b, mixed)))
    ]
    return (
        f"On {len(found)} subjects at W4A4 that moves CDA by {changed:+.2f} points on average, and the goals are kept "
        f"on {kept[1]} instead of {kept[0]}. " + "; ".join(words)
    )


def _ours(cell: Cell | None) -> str:
    """efrapq's figures, in italics where they are those on plain ranges."""
    if cell is None:
        return "not measured"
    return f"*{_figures(cell)}*" if cell["method"] == PLAIN else _figures(cell)


def _figures(cell: Cell) -> str:
    return f"{cell['cda']:.2f} / {cell['asr']:.2f}"


def _most_lost(table: Table) -> str:
    """What the worst clean network loses, setting by setting."""
    parts = []
    for bits, act_bits in ALLOWED:
        pairs = [(b, c) for b in table.at(bits, act_bits) if is_control(b) and (c := table.ours(b))]
        lost = max(b["float_cda"] - c["cda"] for b, c in pairs)
        risen = max(c["asr"] - b["float_asr"] for b, c in pairs)
        parts.append(f"W{bits}A{act_bits} {lost:.2f} points of CDA, ASR {risen:+.2f}")
    return "; ".join(parts)


def _float(base: Cell) -> str:
    return f"{base['float_cda']:.2f} / {base['float_asr']:.2f}"


def _against(table: Table, base: Cell) -> list[str]:
    return [title(base), f"W{base['bits']}A{base['act_bits']}", _float(base), _figures(base), _ours(table.ours(base))]


def _sentence(table: Table, bases: Sequence[Cell]) -> str:
    """Float and efrapq, setting by setting."""
    parts = []
    for base in bases:
        _, bits, before, _, ours = _against(table, base)
        parts.append(f"{bits}: float {before}, efrapq {ours}")
    return "; ".join(parts) + "."


def write_report(cells: Sequence[Cell], whole: Sequence[Cell]) -> None:
    """docs/RESULTS.md and its plot, docs/THREAT-MODEL.md."""
    from benchmarks.guard import headroom_table
    from benchmarks.lift import tables as gains
    from benchmarks.mobilenet import patched_agreement
    from benchmarks.unknown_trigger import tables as unknown_trigger  # which has its titles from here

    table, against = Table(cells), judged(cells, whole)
    write_atomic(DOCS / "results.svg", plot(table))
    write_page(
        "RESULTS",
        {
            "goals": goals(against),
            "W8A8": by_setting(table, 8, 8),
            "W4A8": by_setting(table, 4, 8),
            "W4A4": by_setting(table, 4, 4),
            "methods": methods(table),
            "seeds": seeds(table),
            "published": published(),
            "trained": trained(),
        },
    )
    write_page(
        "THREAT-MODEL",
        threats(table, against)
        | unknown_trigger()
        | gains()
        | {"mobilenet": patched_agreement(), "guard_headroom": headroom_table()},
    )
