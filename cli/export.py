"""efrapq export"""

from __future__ import annotations

from pathlib import Path

import click

from efrapq.cli.console import out
from efrapq.cli.options import HELP, TARGETS, json_option
from efrapq.io.text import printable


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    required=True,
    multiple=True,
    metavar="NAME",
    help=f"{TARGETS}. May be given several times.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Of one target. Default: MODEL.TARGET.onnx beside the model.",
)
@json_option
def command(model: Path, targets: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Write a defended MODEL for other runtimes, without touching a code.

    Each new file is checked against its target's rules, read back and its codes compared with the old ones, then
    loaded and run once in ONNX Runtime. With several targets all files are written, or none.
    """
    targets = tuple(dict.fromkeys(targets))
    if output is not None and len(targets) > 1:
        raise click.UsageError("-o names one file; with several targets leave it out: they go beside the model")
    from efrapq.report.evidence import dumps
    from efrapq.retarget import export_all, exported_name

    made = export_all(model, {target: output or exported_name(model, target) for target in targets})
    if as_json:
        files = [
            {"path": str(file.path), "target": file.target, "bytes": len(file.data), "notes": list(file.notes)}
            for file in made
        ]
        document = {"schema": "efrapq.export/2", "codes_sha256": made[0].codes_sha256, "files": files}
        click.echo(dumps(document), nl=False)
        return
    console = out()
    for file in made:
        console.print(f"wrote  {printable(str(file.path))}", markup=False)
        for note in file.notes:
            console.print(f"note   {printable(note, 1000)}", markup=False)
    files_read = "both files" if len(made) == 1 else f"all {len(made) + 1} files"
    console.print(f"codes  {made[0].codes_sha256[:16]}… read back from {files_read}, the same", markup=False)
