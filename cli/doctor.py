"""efrapq doctor"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from efrapq.cli.console import out
from efrapq.cli.options import HELP, json_option

if TYPE_CHECKING:
    from efrapq.doctor import Diagnosis


@click.command(context_settings=HELP)
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
        for key, value in _lines(found):
            console.print(f"{key:<22}{value}", markup=False)
        for problem in found.problems:
            colour = "red" if problem.severity == "error" else "yellow"
            console.print(f"[{colour}]{problem.severity}[/{colour}]: ", end="")
            console.print(f"{problem.what}; {problem.what_to_do}", markup=False)
        if not found.problems:
            console.print("[green]no problems found[/green]")
    return 0 if found.ok else 2


def _lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """What a person wants to see, name and value."""
    yield "python", f"{found.python} on {found.platform}"
    for name, version in found.versions.items():
        yield name, version or "not installed"
    vnni = {True: "with VNNI", False: "without VNNI", None: "VNNI unknown"}[found.vnni]
    yield "cpu", f"{found.cpu or 'unknown'}, {vnni}"
    yield "torch threads", str(found.torch_threads)
    compiled = "numba" in found.versions
    yield "column loop, CPU", "numba" if compiled else "tensor operations; pip install 'efrapq[fast]' compiles it"
    for device in found.cuda_devices:
        yield "torch GPU", f"{device.name}, {device.memory_bytes / 2**30:.0f} GiB"
    if not found.cuda_devices:
        yield "torch GPU", "none"
    yield "ONNX Runtime lists", ", ".join(found.onnxruntime_providers)
    yield "ONNX Runtime on CUDA", ("runs: " if found.onnxruntime_cuda else "no: ") + found.onnxruntime_cuda_reason
