"""efrapq on the command line: the group, lazily loaded commands, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import sys
import traceback
from importlib import metadata
from typing import Any

import click

from efrapq.errors import EfrapqError
from efrapq.io.text import printable

__all__ = ["cli", "main"]

COMMANDS = {
    "defend": "quantize a float model with EFRAP rounding",
    "export": "write a defended file for another runtime",
    "verify": "measure accuracy and attack success in ONNX Runtime",
    "search": "look for a trigger that nobody gave",
    "inspect": "show what a model file holds and what would be quantized",
    "implant": "make a backdoored test subject",
    "demo": "defend a real backdoored network, offline, and show the figures",
    "doctor": "check this installation",
}
EXIT_VERDICT = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
EXIT_BUG = 70  # sysexits.h: EX_SOFTWARE


class LazyGroup(click.Group):
    """Commands are imported when they are run, so that --help needs neither torch nor onnxruntime."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"efrapq.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(metadata.version("efrapq"), prog_name="efrapq")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Quantize models from suppliers you cannot trust.

    A quantization-conditioned backdoor sleeps in a float model and wakes when its weights are rounded to nearest.
    efrapq rounds differently (EFRAP, Li et al., CVPR 2024), writes an int8 or int4 ONNX file, and measures in ONNX
    Runtime that the backdoor stays asleep.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 fine, 1 negative verdict, 2 bad input or usage, 130 interrupted."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    try:
        code: Any = cli.main(arguments, prog_name="efrapq", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit:
        # Only click's own handling of a closed pipe exits from inside; it must not look like a verdict.
        sys.exit(EXIT_PIPE)
    except click.ClickException as exc:
        exc.show()
        sys.exit(EXIT_ERROR)
    except EfrapqError as exc:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {printable(exc, limit=2000)}", err=True)
        sys.exit(EXIT_ERROR)
    except Exception:  # noqa: BLE001  a bug of ours must not look like a verdict
        traceback.print_exc()
        click.echo("internal error: this is a bug in efrapq, please report it with the lines above", err=True)
        sys.exit(EXIT_BUG)
    sys.exit(code if isinstance(code, int) else 0)
