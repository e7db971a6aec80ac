"""efrapq defend"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from efrapq.cli.console import TerminalReporter, out, table
from efrapq.cli.options import (
    HELP,
    TARGETS,
    MemorySize,
    json_option,
    model_options,
    preprocess_from,
    preprocess_options,
    quiet_option,
)
from efrapq.io.text import printable
from efrapq.options import MOST_HEADROOM, RANGES, SCALES, SOLVERS
from efrapq.report.grids import search_words
from efrapq.report.words import size

if TYPE_CHECKING:
    from efrapq.pipeline import Defended


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.int4.onnx beside the model.")
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="Bits of the weights.")
@click.option(
    "--act-bits",
    type=click.Choice(["4", "8", "32"]),
    default="8",
    show_default=True,
    help="Bits of the activations; 32 leaves them float.",
)
@click.option(
    "--edge-bits",
    type=click.IntRange(2, 8),
    default=8,
    show_default=True,
    help="Bits of the first and last layer.",
)
@click.option(
    "--block",
    type=int,
    default=0,
    metavar="N",
    help="One scale per N inputs of an output channel of a matrix, e.g. 32 or 128; needs --act-bits 32.",
)
@click.option(
    "--calib",
    metavar="DATA",
    help="Images to calibrate on: .npz, .npz:split or a folder. Without it, inputs are made from BatchNorm statistics. "
    "For a model that takes anything else: .npz with one array per input, by its name and in its layout (samples on "
    "the batch axis, mostly the first), or a folder of those.",
)
@click.option(
    "--calib-size", type=click.IntRange(1), default=512, show_default=True, help="Use at most so many samples."
)
@preprocess_options
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default="coordinate",
    show_default=True,
    help="coordinate: ours; relaxed: the paper's gradient descent; nearest: no defence.",
)
@click.option(
    "--fidelity",
    type=float,
    metavar="FACTOR",
    help="coordinate: flip as many weights as keeps each layer's L_A within FACTOR of its optimum. 1 is for suppliers "
    "who may have trained against the default.  [default: 1.1]",
)
@click.option(
    "--lambda-e", type=float, help="A fixed weight of the error term instead. Default of relaxed: 1, the paper's."
)
@click.option(
    "--error",
    type=click.Choice(["absolute", "relative"]),
    default="absolute",
    show_default=True,
    help="Truncation error in weight units (the paper's) or in steps.",
)
@click.option("--steps", type=click.IntRange(1), default=10_000, show_default=True, help="Steps a layer of `relaxed`.")
@click.option(
    "--act-range",
    type=click.Choice(RANGES),
    default="auto",
    show_default=True,
    help="Activation ranges: of all values, of 99.99 % of them, of the least squared error, or of the least effect on "
    "the model's outputs (output: slower). auto: minmax at 8 bits, mse at 4.",
)
@click.option(
    "--headroom",
    type=click.FloatRange(1, MOST_HEADROOM),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="Widen min-max activation ranges. A trigger can drive activations past what clean data reach; they are "
    "clipped there, and that alone can wake a backdoor. 2 costs one bit of their resolution.",
)
@click.option(
    "--stress/--no-stress",
    default=True,
    show_default=True,
    help="Activation ranges of a network of images (all but output) are also chosen for the calibration images with "
    "random patches on them: most triggers are patches.",
)
@click.option(
    "--cover",
    multiple=True,
    metavar="SPEC",
    help="Choose them for the calibration images with this trigger on them, too, given as for verify, or found by "
    "search: what it drives further is then not clipped. May be repeated.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="With --act-bits 4: 8 bits for the activations that patches, or a trigger of --cover, drive far past what the "
    "images reach. 16 steps do not cover that, and what is clipped can wake a backdoor.",
)
@click.option(
    "--guard",
    is_flag=True,
    help="Give the file a second output, `clipped`: for each sample, at how many ends of activation grids it arrived. "
    "Where it is 0 nothing was clipped, and no backdoor can have woken by that; do not use the other answers.",
)
@click.option(
    "--search",
    is_flag=True,
    help="Then look for a trigger in the file, as `efrapq search` does, on the images of --calib; cover what is found, "
    "and look again. Takes minutes.",
)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="minmax",
    show_default=True,
    help="Weight scales: the largest weight's; of least rounding error; re-fitted to the codes.",
)
@click.option(
    "--equalize",
    is_flag=True,
    help="First scale channels, where the network's function stays the same, so that one activation grid serves them "
    "all: for MobileNets and their like.",
)
@click.option(
    "--lift/--no-lift",
    default=True,
    show_default=True,
    help="Scale up channels that an activation grid would round away although a layer behind amplifies them: a "
    "backdoor can hide there. Ordinary networks have next to none.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Accumulate a layer's moments over at most so many rows per input of an output channel.",
)
@click.option("--target", metavar="NAME", help=f"{TARGETS}. Default: the machine it runs on.")
@model_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--memory",
    type=MemorySize(),
    metavar="SIZE",
    help="Keep so much of the activations in memory, e.g. 2G; the rest goes to temporary files. Default: half of what "
    "is free.",
)
@click.option("--resume", is_flag=True, help="Continue a run of the same command that was stopped.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@quiet_option
def command(
    model: Path,
    output: Path | None,
    bits: int,
    act_bits: str,
    edge_bits: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: tuple[int, int] | None,
    search: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Quantize MODEL (.pt, .safetensors or .onnx) with EFRAP rounding.

    Writes a QDQ graph, and beside it the evidence (.json): hashes, settings, and what happened to every layer.

    An ONNX model may have external data, in plain files of its own folder. From 256 MiB on its weights are read one at
    a time, wherever they are. A result past 2 GiB has external data of its own, in the file OUTPUT.data.

    With --search the exit code is 1 if a trigger is found even in a file whose ranges cover those found before it.
    """
    from efrapq.pipeline import default_output, defend
    from efrapq.report.evidence import dumps

    output = output or default_output(model, bits)
    options |= {"bits": bits, "act_bits": int(act_bits), "edge_bits": edge_bits}
    options |= {"preprocess": preprocess_from(mean, std, size), "reporter": TerminalReporter(quiet=quiet)}
    passed = True
    if search:
        from efrapq.hunt import defend_searched

        searched = defend_searched(model, output, **options)
        made, passed = searched.made, searched.passed
    else:
        made = defend(model, output, **options)
    if as_json:
        click.echo(dumps(made.evidence), nl=False)
    else:
        _print(made.evidence, classes=_may_hold_classes(made))
    return 0 if passed else 1


def _may_hold_classes(made: Defended) -> bool:
    """Whether verify can be asked for an attack success rate: the model takes images, and may answer with classes."""
    from efrapq.verification.images import lacks_classes

    if made.evidence["calibration"]["kind"] == "arrays":
        return False
    shape = made.quantized.model.graph.outputs[0].shape
    return shape is None or not lacks_classes([d if isinstance(d, int) else 0 for d in shape])


def _print(evidence: dict[str, Any], *, classes: bool) -> None:
    console = out()
    shown = table("layer", "op", "bits", "flipped", "L_A nearest", "L_A efrapq")
    for layer in evidence["layers"]:
        shown.add_row(
            printable(layer["name"]).replace("[", "\\["),
            layer["op_type"],
            str(layer["bits"]),
            f"{layer['flipped']:.1f} %",
            f"{layer['loss_nearest']:.4g}",
            f"{layer['loss']:.4g}",
        )
    console.print(shown)
    before, after = evidence["input"]["bytes"], evidence["output"]["bytes"]
    console.print()
    console.print(f"wrote     {printable(evidence['output']['path'])}  ({size(before)} → {size(after)})", markup=False)
    console.print(f"evidence  {printable(str(Path(evidence['output']['path']).with_suffix('.json')))}", markup=False)
    console.print(
        f"flipped   {evidence['flipped']:.1f} % of all weights away from round-to-nearest, "
        f"{evidence['timing']['seconds']:.1f} s in all",
        markup=False,
    )
    if (guard := evidence.get("guard")) is not None:
        console.print(
            f"guard     output `{printable(guard['output'])}` counts what arrives at an end, of {guard['watched']} "
            "activations: use answers where it is 0",
            markup=False,
        )
    attack = " --trigger patch:HxW@row,col --target-class N" if classes else ""
    for search in evidence.get("searches", ()):
        console.print(_outcome(search), markup=False)
        if search["trigger"]:
            attack = f" --trigger {printable(search['trigger'])} --target-class {search['target_class']}"
    console.print(
        f"next      efrapq verify {printable(evidence['output']['path'])} --data TEST.npz{attack}", markup=False
    )
    if classes and "searches" not in evidence:
        console.print(
            f"or        efrapq search {printable(evidence['output']['path'])} --data IMAGES, where no trigger is known",
            markup=False,
        )


def _outcome(search: dict[str, Any]) -> str:
    """One search of several, in a line."""
    found = "" if search["verdict"] == "pass" else f": {printable(search['trigger'])}"
    return f"searched  {search_words(search)}{found}"
