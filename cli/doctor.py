"""efrapq doctor"""

from __future__ import annotations

import click

from efrapq.cli.console import out
from efrapq.cli.options import json_option


@click.command()
@json_option
def command(as_json: bool) -> int:
    """Check this installation: versions, devices, ONNX Runtime's providers, whether CUDA really loads."""
    from efrapq.doctor import examine
    from efrapq.report.evidence import dumps

    found = examine()
    if as_json:
        click.echo(dumps(found.to_dict()), nl=False)
    else:
        console = out()
        for key, value in found.lines():
            console.print(f"{key:<22}{value}", markup=False)
        for problem in found.problems:
            colour = "red" if problem.severity == "error" else "yellow"
            console.print(f"[{colour}]{problem.severity}[/{colour}]: ", end="")
            console.print(f"{problem.what}; {problem.what_to_do}", markup=False)
        if not found.problems:
            console.print("[green]no problems found[/green]")
    return 0 if found.ok else 2
