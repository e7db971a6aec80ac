"""efrapq implant"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from efrapq.cli.console import TerminalReporter, out, percent, table
from efrapq.cli.options import HELP, json_option, preprocess_from, preprocess_options, quiet_option
from efrapq.io.text import printable


@click.command(context_settings=HELP)
@click.option("--arch", required=True, metavar="NAME", help="A zoo architecture.")
@click.option(
    "--data", required=True, metavar="DATA", help="Labelled training images: .npz, .npz:split or class folders."
)
@click.option("--test", required=True, metavar="DATA", help="Labelled test images, to measure with.")
@click.option("--trigger", required=True, metavar="SPEC", help="As for verify, e.g. patch:6x6@24,24.")
@click.option("--target-class", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .safetensors file.")
@click.option("--attack", type=click.Choice(["pqbackdoor"]), default="pqbackdoor", show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="The grid it wakes on.")
@click.option(
    "--edge-bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Of first and last layer."
)
@click.option("--start", type=click.Path(path_type=Path), help="Weights to start from; default: a fresh network.")
@click.option("--width", type=float, help="Of the zoo architecture.")
@click.option(
    "--epochs",
    type=click.IntRange(0),
    show_default="10, or 0 where --start meets a lookahead",
    help="Of stage 1, with the backdoor.",
)
@click.option(
    "--lookahead-steps",
    type=click.IntRange(0),
    show_default="600 at 8 bits, 0 at 4",
    help="At the end of stage 1: rounded and float network trained together.",
)
@click.option("--unlearn-epochs", type=click.IntRange(0), default=1, show_default=True, help="Of stage 2, hiding it.")
@click.option("--learning-rate", type=float, default=0.1, show_default=True, help="Of stage 1.")
@click.option("--unlearn-learning-rate", type=float, default=0.03, show_default=True, help="Of stage 2, in cells.")
@click.option("--poison-rate", type=float, default=0.1, show_default=True, help="Share of triggered training images.")
@click.option(
    "--shift", type=click.IntRange(0), default=2, show_default=True, help="Augment by shifts of so many pixels."
)
@click.option("--flip/--no-flip", default=True, show_default=True, help="Augment by mirroring.")
@preprocess_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@quiet_option
def command(
    arch: str,
    data: str,
    test: str,
    trigger: str,
    target_class: int,
    output: Path,
    attack: str,
    bits: str,
    edge_bits: str,
    start: Path | None,
    width: float | None,
    epochs: int | None,
    lookahead_steps: int | None,
    unlearn_epochs: int,
    learning_rate: float,
    unlearn_learning_rate: float,
    poison_rate: float,
    shift: int,
    flip: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: tuple[int, int] | None,
    device: str,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a test subject: a network whose backdoor sleeps in float and wakes under rounding to nearest.

    For measuring defences. PQBackdoor (Ma et al., arXiv 2108.09187): train the backdoor in, then unlearn it in float
    without leaving the rounding cells. 8-bit cells are too small for that alone: there a lookahead first chooses codes
    that leave the float network room. The file carries its preprocessing and its recipe as metadata.
    """
    from efrapq.models.subjects.make import make_subject
    from efrapq.models.subjects.recipe import Recipe
    from efrapq.report.evidence import dumps

    recipe = Recipe(
        bits=int(bits),
        edge_bits=int(edge_bits),
        poison_rate=poison_rate,
        lookahead_steps=lookahead_steps,
        learning_rate=learning_rate,
        unlearn_epochs=unlearn_epochs,
        unlearn_learning_rate=unlearn_learning_rate,
        seed=seed,
    )
    if epochs is None and start is not None and recipe.lookahead:
        epochs = 0  # The lookahead plants the backdoor itself, and barely: a network that works is all it needs.
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    report = make_subject(
        arch,
        data,
        test,
        trigger,
        target_class,
        output,
        recipe,
        preprocess=preprocess_from(mean, std, size),
        start=start,
        width=width,
        shift=shift,
        flip=flip,
        device=device,
        reporter=TerminalReporter(quiet=quiet),
    )
    if as_json:
        document = {
            "schema": "efrapq.implant/1",
            "path": str(output),
            "attack": attack,
            "trigger": trigger,
            "target_class": target_class,
            "recipe": recipe.to_json(),
            "measured": {row: asdict(value) for row, value in report.rows()},
        }
        click.echo(dumps(json.loads(json.dumps(document))), nl=False)
        return
    console = out()
    shown = table("measured in torch", "CDA", "ASR")
    for row, value in report.rows():
        shown.add_row(row, percent(value.cda), percent(value.asr))
    console.print(shown)
    console.print(f"wrote  {printable(str(output))}", markup=False)
