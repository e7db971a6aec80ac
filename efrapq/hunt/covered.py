"""defend_searched(): a file in which the search finds nothing, or word that it does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efrapq.data import Dataset
from efrapq.errors import UsageError
from efrapq.hunt.search import Found, search_trigger
from efrapq.io import printable, write_atomic
from efrapq.options import check_covering
from efrapq.pipeline import Defended, defend
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import dumps
from efrapq.trigger import Trigger

if TYPE_CHECKING:
    from efrapq.preprocess import Preprocess, PreprocessOverride

__all__ = ["Searched", "defend_searched"]

# Triggers to cover before it is given up: what lies in the weights is awake whatever the ranges cover.
COVERED = 2
# What a search says of itself in the evidence of the file that it was made in.
RECORDED = ("samples", "effort", "patch", "target_class", "turned", "exchanged", "trigger", "verdict")


@dataclass(frozen=True)
class Searched:
    """made: the last file. searches: what was found in it and in those before it, the last one's last."""

    made: Defended
    searches: list[Found]

    @property
    def passed(self) -> bool:
        """Whether nothing was found in the file that was left."""
        return self.searches[-1].passed


def defend_searched(
    model: str | Path,
    output: str | Path,
    *,
    calib: str | Path | Dataset,
    cover: Sequence[str | Trigger] = (),
    preprocess: Preprocess | PreprocessOverride | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
    search_steps: int = 100,
    **options: Any,
) -> Searched:
    """Defend, look for a trigger in the file, cover it, and look again, until nothing is found or two are covered.

    Networks in whose files nothing is found get the file that `defend` writes. calib: images, which are searched on as
    well. search_steps: of each search. options: those of `defend`. A trigger that is found goes beside the output, as
    model.int4.trigger1.npz. The evidence names all searches.

    Raises EfrapqError for bad inputs.
    """
    started = time.perf_counter()
    reporter = reporter or Silent()
    if calib is None or isinstance(calib, Mapping):
        raise UsageError("--search looks for patches on images: pass some with --calib")
    check_covering("--search", options.get("act_bits", 8), options.get("act_range", "auto"))
    output = Path(output)
    covers, searches = list(cover), list[Found]()
    free = (output.with_suffix(f".trigger{number}.npz") for number in count(1))
    about: dict[str, Any] = {
        "arch": arch,
        "input_shape": input_shape,
        "device": device,
        "seed": seed,
        "trust_pickle": trust_pickle,
        "preprocess": preprocess,
        "reporter": reporter,
    }
    while True:
        made = defend(model, output, calib=calib, cover=covers, **about, **options)
        trigger = next(path for path in free if str(path) not in map(str, covers))
        found = search_trigger(output, data=calib, output=trigger, float_model=model, steps=search_steps, **about)
        searches.append(found)
        _record(made, searches, time.perf_counter() - started)
        if found.passed:
            return Searched(made, searches)
        turned = found.document["turned"]
        reporter.warn(
            f"a patch turns {turned['file']:.1f} % of the answers in the file and {turned['float']:.1f} % in the float "
            f"model ({printable(trigger.name)})"
        )
        if len(searches) > COVERED:
            reporter.warn("do not deploy this file: ranges that cover what was found do not silence it")
            return Searched(made, searches)
        reporter.note("once more, with activation ranges that cover it")
        covers.append(str(trigger))


def _record(made: Defended, searches: list[Found], seconds: float) -> None:
    """Write the searches, and how long all of it took, into the file's evidence."""
    assert made.evidence_path is not None
    made.evidence["searches"] = [{key: found.document[key] for key in RECORDED} for found in searches]
    made.evidence["timing"]["seconds"] = round(seconds, 3)
    write_atomic(made.evidence_path, dumps(made.evidence).encode())
