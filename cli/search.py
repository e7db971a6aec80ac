"""efrapq search"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from efrapq.cli.console import TerminalReporter, out, table
from efrapq.cli.options import HELP, json_option, model_options, preprocess_from, preprocess_options, quiet_option
from efrapq.io.text import printable
from efrapq.report.words import percent


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Images: .npz, .npz:split or a folder, labelled or not. Half of them are searched on, at most 512, and as "
    "many others measured on.",
)
@click.option(
    "--float", "float_model", type=click.Path(path_type=Path), help="The defended model. Default: as the evidence says."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Of a trigger that is found. Default: MODEL.trigger.npz."
)
@click.option("--side", type=click.IntRange(1), help="Of the patch, in pixels. Default: 3/16 of the image's.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Of the search over all places together.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@preprocess_options
@model_options
@json_option
@quiet_option
def command(
    model: Path,
    output: Path | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: tuple[int, int] | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Look for a trigger in MODEL, a quantized file, without knowing any.

    What is searched for is one patch that turns the answers to most images into one class in the file, and not in its
    float model; it is measured in ONNX Runtime, on other images. Where it turns half of them, the same search with the
    two models exchanged says how far any two networks can be told apart that differ by rounding alone. Takes minutes.

    The exit code is the verdict: 0 nothing found, 1 a trigger. Nothing found is no proof that there is none: a trigger
    that is no patch, or a far larger one, is not what is searched for.
    """
    from efrapq.hunt import search_trigger
    from efrapq.report.evidence import dumps

    found = search_trigger(
        model,
        output=output or model.with_suffix(".trigger.npz"),
        preprocess=preprocess_from(mean, std, size),
        reporter=TerminalReporter(quiet=quiet),
        **options,
    )
    if as_json:
        click.echo(dumps(found.document), nl=False)
    else:
        print_search(found.document, out())
    return 0 if found.passed else 1


def print_search(document: dict[str, Any], console: Console) -> None:
    """What was found as a person reads it."""
    patch, target = document["patch"], document["target_class"]
    shown = table("images turned by the best patch", "float", "file")
    shown.add_row("searched for in the file", *(percent(document["turned"][k]) for k in ("float", "file")))
    if document["exchanged"] is not None:
        rates = (percent(document["exchanged"][k]) for k in ("float", "file"))
        shown.add_row("searched for in the float model", *rates)
    console.print(shown)
    console.print()
    samples = document["samples"]
    console.print(
        f"patch    {patch['side']}x{patch['side']} at {patch['row']},{patch['col']}, {patch['share']:.1f} % of the "
        f"image, to class {target}",
        markup=False,
    )
    console.print(f"samples  {samples['searched']} searched on, {samples['measured']} others measured", markup=False)
    if document["verdict"] == "pass":
        console.print(
            "verdict  [green]pass[/green]: no patch was found that the file answers and the float model does not"
        )
        return
    console.print("verdict  [red]fail[/red]: the file answers a trigger that the float model does not")
    if document["trigger"]:
        path = printable(document["trigger"])
        console.print(f"trigger  {path}", markup=False)
        console.print(
            f"next     efrapq verify {printable(document['model']['path'])} --data TEST.npz --trigger {path} "
            f"--target-class {target}",
            markup=False,
        )
