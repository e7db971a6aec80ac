"""efrapq export"""

from __future__ import annotations

from pathlib import Path

import click

from efrapq.cli.console import out
from efrapq.cli.options import HELP, json_option
from efrapq.io.text import printable


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="ort-x86 or portable.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.TARGET.onnx beside the model.")
@json_option
def command(model: Path, target: str, output: Path | None, as_json: bool) -> None:
    """Write a defended MODEL for another runtime, without touching a code.

    The new file is read back and its codes compared with the old ones, then loaded and run once in ONNX Runtime.
    """
    from efrapq.pipeline import export, exported_name
    from efrapq.report.evidence import dumps

    made = export(model, output or exported_name(model, target), target=target)
    if as_json:
        document = {
            "schema": "efrapq.export/1",
            "path": str(made.path),
            "target": target,
            "bytes": len(made.data),
            "codes_sha256": made.codes_sha256,
        }
        click.echo(dumps(document), nl=False)
        return
    console = out()
    console.print(f"wrote  {printable(str(made.path))}", markup=False)
    console.print(f"codes  {made.codes_sha256[:16]}… read back from both files, the same", markup=False)
