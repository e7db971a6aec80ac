"""Draw the growth of the solver's cost from results/solver.json into docs/solver-growth.svg."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS

DOCS = RESULTS.parents[1] / "docs"


def main() -> None:
    growth = json.loads((RESULTS / "solver.json").read_text())["growth"]
    mpl.rcParams["svg.hashsalt"] = "efrapq"  # the same figures give the same file
    figure, axes = plt.subplots(1, len(growth), figsize=(4 * len(growth), 3.2), layout="constrained")
    for axis, (key, found) in zip(axes, growth.items(), strict=True):
        slope, intercept = found["line"]
        sizes = found["sizes"]
        axis.plot(sizes, [slope * s + intercept for s in sizes], color="0.7", label="straight line")
        axis.plot(sizes, found["seconds"], "o", color="C0", label="measured")
        axis.set_title(f"{found['title']}\nexponent {found['exponent']:.2f}", fontsize=9)
        axis.set_xlabel("images" if key == "rows" else key)
        axis.set_ylabel("seconds of the pass")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.savefig(DOCS / "solver-growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
