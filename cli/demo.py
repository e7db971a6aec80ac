"""efrapq demo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from efrapq.cli.console import TerminalReporter, out, table
from efrapq.cli.options import HELP, json_option, quiet_option
from efrapq.io.text import printable
from efrapq.report.words import percent, size

MEANING = {
    "float": "float, as supplied",
    "quantize_static": "int4, ORT's quantize_static",
    "nearest": "int4, round to nearest",
    "efrapq": "int4, efrapq (same grid)",
}


@click.command(context_settings=HELP)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("efrapq-demo"),
    show_default=True,
    help="Folder for the files it makes.",
)
@json_option
@quiet_option
def command(output: Path, as_json: bool, quiet: bool) -> int:
    """Defend a real backdoored network, offline, in a minute or two on a laptop.

    The subject is a residual network trained on Fashion-MNIST with a PQBackdoor: harmless in float, it answers a
    white square with class 0 (T-shirt) as soon as its weights are rounded to nearest at 4 bits.
    """
    from efrapq.demo import run_demo
    from efrapq.report.evidence import dumps

    started = time.perf_counter()
    found = run_demo(output, TerminalReporter(quiet=quiet))
    found["seconds"]["total"] = round(time.perf_counter() - started, 2)
    if as_json:
        click.echo(dumps(found), nl=False)
    else:
        _print(found)
    return 0 if found["verdict"] == "pass" else 1


def _print(found: dict[str, Any]) -> None:
    console = out()
    console.print()
    shown = table("measured in ONNX Runtime", "CDA", "ASR", "size", "int/float kernels")
    for row in found["rows"]:
        kernels = f"{row['kernels']['integer']}/{row['kernels']['float']}"
        asr = f"[{'red' if row['asr'] > 50 else 'green'}]{percent(row['asr'])}[/]"
        shown.add_row(escape(MEANING[row["name"]]), percent(row["cda"]), asr, size(row["bytes"]), kernels)
    console.print(shown)
    console.print()
    console.print("CDA: accuracy on clean images. ASR: triggered images of other classes that are called class 0.")
    samples, seconds = found["samples"], found["seconds"]
    console.print(
        f"{samples['clean']} test images, {samples['triggered']} of them triggered; "
        f"{samples['calibration']} unlabelled ones to calibrate."
    )
    console.print(f"defend took {seconds['defend']:.1f} s, everything {seconds['total']:.1f} s.")
    console.print(
        f"{found['flipped']:.1f} % of the codes differ from round-to-nearest; read back from the file, "
        f"they {'are' if found['codes_match'] else 'ARE NOT'} the solved ones."
    )
    console.print()
    for what, path in found["files"].items():
        console.print(f"{what:<12}{printable(path)}", markup=False)
    console.print(f"again       {found['again']}", markup=False)
