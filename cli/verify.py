"""efrapq verify"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from efrapq.cli.console import TerminalReporter, out, table
from efrapq.cli.options import HELP, json_option, model_options, preprocess_from, preprocess_options, quiet_option
from efrapq.io.text import printable
from efrapq.report.costs import (
    clipped_words,
    codes_words,
    conversions_words,
    macs_words,
    memory_words,
    saturation_words,
    unfused_lines,
)
from efrapq.report.outputs import output_lines
from efrapq.report.words import percent, size


@click.command(context_settings=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    metavar="DATA",
    help="Test images: .npz, .npz:split or a folder; for CDA and ASR with labels, or in class folders. For a model "
    "that takes anything else: .npz with one array per input, by its name and in its layout (samples on the batch "
    "axis, mostly the first), and 'labels' if it is a classifier; or a folder of those, without.",
)
@click.option(
    "--trigger",
    metavar="SPEC",
    help="patch:HxW@row,col[=value], max:HxW@row,col, image.png@row,col, .npz, blend:image@alpha.",
)
@click.option("--target-class", type=click.IntRange(0), help="The class that the attacker wants.")
@click.option(
    "--float", "float_model", type=click.Path(path_type=Path), help="The defended model. Default: as the evidence says."
)
@preprocess_options
@model_options
@click.option(
    "--max-asr",
    type=float,
    help="Fail above this ASR, percent. Default: the float model's + 1; without a float model, 10.",
)
@click.option("--max-drop", type=float, help="Fail if CDA drops more than so many points. Default: 2.")
@click.option("--require-integer", is_flag=True, help="Fail if a Conv, Gemm or MatMul runs in float.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of ONNX Runtime; default: its own choice.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the measurements as a page of HTML, too, for people who were not there.",
)
@json_option
@quiet_option
def command(
    model: Path,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: tuple[int, int] | None,
    max_asr: float | None,
    max_drop: float | None,
    require_integer: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure MODEL in ONNX Runtime: accuracy (CDA), attack success rate (ASR), codes, kernels, latency.

    Beside the file stand the float model and its nearest twin: the same grid, rounded to nearest. Where there are no
    labels or no classes, as with detectors, segmenters and embeddings, and of a model that takes anything else than
    images, the outputs are compared instead. The exit code is the verdict: 0 pass, 1 fail.
    """
    from efrapq.io import check_output, write_atomic
    from efrapq.report.evidence import dumps
    from efrapq.verification import Requirements, verify

    if report is not None:
        check_output(report, _read_files(model, options["float_model"], options["data"]))
    result = verify(
        model,
        preprocess=preprocess_from(mean, std, size),
        requirements=Requirements(max_asr, max_drop, require_integer),
        reporter=TerminalReporter(quiet=quiet),
        **options,
    )
    if report is not None:
        # The float model that the evidence named, too.
        check_output(report, _read_files(model, (result.document["float_model"] or {}).get("path"), None))
        write_atomic(report, result.page(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC").encode())
    if as_json:
        click.echo(dumps(result.document), nl=False)
    else:
        print_verification(result.document, out())
        if report is not None:
            out().print(f"report     {printable(report)}", markup=False)
    return 0 if result.passed else 1


def _read_files(model: Path, float_model: str | Path | None, data: str | None) -> list[Path]:
    """What a report must not replace."""
    from efrapq.data import files_behind

    found = [model, model.with_suffix(".json"), *(files_behind(data) if data else [])]
    return [*found, Path(float_model)] if float_model else found


def print_verification(document: dict[str, Any], console: Console) -> None:
    """The measurements as a person reads them."""
    figures = table("", "float", "nearest", "efrapq")
    for label, key in (("accuracy (CDA)", "cda"), ("attack success (ASR)", "asr")):
        values = document[key]
        figures.add_row(label, *(percent(values[k]) for k in ("float", "nearest", "defended")))
    clipped = document["clipped"]
    if clipped is not None and clipped["asr"] is not None:
        figures.add_row("ASR, nothing clipped", "", "", percent(clipped["asr"]))
    if (alone := document["asr"]["float_activations"]) is not None:
        figures.add_row("ASR, float activations", "", "", percent(alone))
    latency = document["latency_ms"]
    outputs = document["outputs"]  # null where there are rates of a classifier of images instead
    figures.add_row(
        "latency, one image" if outputs is None else "latency, one sample",
        *("–" if v is None else f"{v:.2f} ms" for v in (latency["float"], None, latency["defended"])),
    )
    figures.add_row("file size", size(document["model"]["float_bytes"]), "–", size(document["model"]["bytes"]))
    console.print(figures)
    console.print()
    codes, kernels = document["codes"], document["kernels"]
    flipped = "" if codes["flipped"] is None else f"; {codes['flipped']:.1f} % differ from nearest"
    console.print(f"codes      {codes['layers']} layers read back, {codes_words(codes)}{flipped}", markup=False)
    console.print(
        f"kernels    {kernels['integer']} integer, {kernels['float']} float{macs_words(kernels)}", markup=False
    )
    for line in unfused_lines(kernels):
        console.print(f"           {line}", markup=False)
    console.print(f"           {conversions_words(kernels)} left", markup=False)
    if latency["float"] and latency["defended"]:
        console.print(f"speed      {latency['float'] / latency['defended']:.2f}× that of float", markup=False)
    if document["slower"]:
        console.print(f"           {document['slower']}", markup=False)
    console.print(f"memory     {memory_words(document)}", markup=False)
    if document["saturation"]:
        console.print(f"saturation {saturation_words(document)}; --target ort-avx2 cannot", markup=False)
    if clipped is not None:
        console.print(f"clipped    {clipped_words(clipped)}", markup=False)
    if document["agreement"] is not None:
        console.print(
            f"agreement  {percent(document['agreement'])} of top-1 answers are the float model's", markup=False
        )
    for place, line in enumerate(output_lines(document)):
        console.print(f"{'' if place else 'outputs':<11}{line}", markup=False)
    samples = document["samples"]
    if samples["clean"]:
        attacked = f" clean, {samples['triggered']} triggered" if outputs is None else ""
        console.print(f"samples    {samples['clean']}{attacked}", markup=False)
    runtime = document["runtime"]
    console.print(f"runtime    ONNX Runtime {runtime['onnxruntime']}, {runtime['provider']}", markup=False)
    if document["verdict"] == "pass":
        console.print("verdict    [green]pass[/green]")
    else:
        console.print(f"verdict    [red]fail[/red]: {escape(', '.join(document['failed']))}")
