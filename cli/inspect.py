"""efrapq inspect"""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from efrapq.cli.console import out, table
from efrapq.cli.options import HELP, json_option, model_options
from efrapq.io.text import printable
from efrapq.report.costs import conversions_words, macs_words, memory_words, unfused_lines
from efrapq.report.words import size


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@model_options
@json_option
def command(
    model: Path, arch: str | None, input_shape: tuple[int, int, int] | None, trust_pickle: bool, as_json: bool
) -> None:
    """Show what MODEL holds: layers, bits, what would be quantized and what would stay float, and why."""
    from efrapq.inspection import inspect
    from efrapq.report.evidence import dumps

    found = inspect(model, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
    if as_json:
        click.echo(dumps(found), nl=False)
        return
    console = out()
    described = found["architecture"] or f"opset {found['opset']}"
    console.print(
        f"{printable(found['path'])}: {found['kind']} {found['format']}, {printable(described)}, "
        f"{size(found['bytes'])}, {found['parameters']:,} weights in {len(found['layers'])} layers",
        markup=False,
    )
    for key, value in found["metadata"].items():
        console.print(f"  {printable(key)} = {printable(value)}", markup=False)
    # What becomes of an eligible layer of a quantized file is the runtime's decision; its count stands below.
    yes = "eligible" if found["kind"] == "quantized" else "yes"
    shown = table("layer", "op", "shape", "bits", "integer kernel")
    for layer in found["layers"]:
        shape = "×".join(str(d) for d in layer["shape"])
        shown.add_row(
            escape(printable(layer["name"])),
            layer["op_type"],
            shape,
            str(layer["bits"]),
            yes if layer["integer"] else "no",
        )
    if found["layers"]:
        console.print(shown)
    for skipped in found["float"]:
        console.print(
            f"stays float: {printable(skipped['op_type'])} {printable(skipped['node'])}: {skipped['reason']}",
            markup=False,
        )
    if found["kernels"] is not None:
        kernels = found["kernels"]
        console.print(
            f"kernels in ONNX Runtime: {kernels['integer']} integer, {kernels['float']} float{macs_words(kernels)}",
            markup=False,
        )
        for line in unfused_lines(kernels) if found["kind"] == "quantized" else []:
            console.print(f"  {line}", markup=False)
        console.print(f"conversions left: {conversions_words(kernels)}", markup=False)
    console.print(f"memory: {memory_words(found)}", markup=False)
    for note in found["notes"]:
        console.print(f"note: {printable(note, 1000)}", markup=False)
