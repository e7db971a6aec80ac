"""efrapq implant"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from efrapq.cli.console import TerminalReporter, out, table
from efrapq.cli.options import HELP, json_option, preprocess_from, preprocess_options, quiet_option
from efrapq.io.text import printable
from efrapq.models.subjects.attacks import attack_named, attack_names
from efrapq.report.words import percent


@click.command(context_settings=HELP)
@click.option("--arch", required=True, metavar="NAME", help="A zoo architecture.")
@click.option(
    "--data", required=True, metavar="DATA", help="Labelled training images: .npz, .npz:split or class folders."
)
@click.option("--test", required=True, metavar="DATA", help="Labelled test images, to measure with.")
@click.option("--trigger", required=True, metavar="SPEC", help="As for verify, e.g. patch:6x6@24,24.")
@click.option("--target-class", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .safetensors file.")
@click.option(
    "--attack",
    type=click.Choice(attack_names()),
    default=attack_names()[0],
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(attack_names())}.",
)
@click.option(
    "--bits", type=click.Choice(["4", "8", "8,4"]), default="4", show_default=True, help="The grid it wakes on."
)
@click.option(
    "--edge-bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Of first and last layer."
)
@click.option("--start", type=click.Path(path_type=Path), help="Weights to start from; default: a fresh network.")
@click.option("--width", type=float, help="Of the zoo architecture.")
@click.option(
    "--epochs",
    type=click.IntRange(0),
    show_default="10, or 0 where --start is clean weights that the attack goes on from",
    help="Of pqbackdoor's stage 1, of badnets, of the backdoored network that compartifact takes apart; else of clean "
    "training, before the attack.",
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    show_default="2000",
    help="Of training float and rounded network together; not for pqbackdoor and badnets.",
)
@click.option(
    "--learning-rate",
    type=float,
    show_default="0.1; compartifact 0.01, qu-anti and adaptive 0.0001",
    help="Of the training that plants the backdoor.",
)
@click.option(
    "--poison-rate",
    type=float,
    show_default="0.1",
    help="pqbackdoor, badnets, compartifact from scratch: share of triggered training images.",
)
@click.option(
    "--lookahead-steps",
    type=click.IntRange(0),
    show_default="600 at 8 bits, 0 at 4",
    help="pqbackdoor: at the end of stage 1, rounded and float network trained together.",
)
@click.option("--unlearn-epochs", type=click.IntRange(0), show_default="1", help="pqbackdoor: of stage 2, hiding it.")
@click.option("--unlearn-learning-rate", type=float, show_default="0.03", help="pqbackdoor: of stage 2, in cells.")
@click.option(
    "--resolve-every",
    type=click.IntRange(1),
    show_default="100",
    help="adaptive-solver: steps between two runs of the defence.",
)
@click.option(
    "--fidelity",
    type=float,
    show_default="1.1",
    help="adaptive-solver: what the defender is expected to pass to defend.",
)
@click.option("--widen", type=float, show_default="2", help="adaptive-scale: how many times wider the cells become.")
@click.option(
    "--reach",
    type=float,
    show_default="1",
    help="adaptive-clip: it wakes where activations are cut off at so many times what clean images reach.",
)
@click.option(
    "--patches",
    type=float,
    show_default="none",
    help="adaptive-clip: share of the clean images with random patches on them, as `defend --stress` puts them.",
)
@click.option(
    "--decoys",
    type=float,
    show_default="none",
    help="adaptive-clip: share of them with patches such as `search` tries, which train along.",
)
@click.option(
    "--channels",
    type=click.IntRange(1),
    show_default="4",
    help="adaptive-step: so many channels speak below a step of their grid, and as many hear them.",
)
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
    steps: int | None,
    learning_rate: float | None,
    poison_rate: float | None,
    lookahead_steps: int | None,
    unlearn_epochs: int | None,
    unlearn_learning_rate: float | None,
    resolve_every: int | None,
    fidelity: float | None,
    widen: float | None,
    reach: float | None,
    patches: float | None,
    decoys: float | None,
    channels: int | None,
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

    For measuring defences. The published attacks: PQBackdoor (Ma et al., arXiv 2108.09187), Qu-ANTI-zation (Hong et
    al., NeurIPS 2021; --bits 8,4 wakes on both) and CompArtifact (Tian et al., arXiv 2104.15129), from scratch or
    distilled from a clean network. Attackers who know EFRAP: adaptive-stochastic trains through random roundings,
    adaptive-solver through EFRAP's own, adaptive-scale makes the rounding cells wide, adaptive-clip wakes where
    activations are cut off, adaptive-step where they are rounded. The control is badnets: a plain backdoor, awake in
    float, which no rounding removes.

    All but pqbackdoor and badnets begin with a clean network, the one of --start or one trained first; compartifact
    from scratch with a backdoored one that it trains. The file carries its preprocessing and its recipe as metadata.
    """
    from efrapq.models.subjects.make import make_subject
    from efrapq.report.evidence import dumps

    chosen = {
        "bits": bits,
        "edge_bits": int(edge_bits),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "poison_rate": poison_rate,
        "lookahead_steps": lookahead_steps,
        "unlearn_epochs": unlearn_epochs,
        "unlearn_learning_rate": unlearn_learning_rate,
        "resolve_every": resolve_every,
        "fidelity": fidelity,
        "widen": widen,
        "reach": reach,
        "patches": patches,
        "decoys": decoys,
        "channels": channels,
    }
    method = attack_named(attack)
    given = {name: value for name, value in chosen.items() if value is not None}
    recipe = method.make_recipe(given, started=start is not None)
    report = make_subject(
        arch,
        data,
        test,
        trigger,
        target_class,
        output,
        recipe,
        attack=method,
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
