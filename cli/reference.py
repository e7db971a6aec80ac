"""The command-line reference, generated from --help: `python -m efrapq.cli.reference > docs/CLI.md`."""

from __future__ import annotations

import click

from efrapq.cli.main import COMMANDS, cli

__all__ = ["reference"]

HEAD = "# Command-line reference\n\nGenerated from `--help` by `python -m efrapq.cli.reference > docs/CLI.md`.\n"


def reference() -> str:
    """Markdown with the help of the group and of every command."""
    parts = [HEAD, _section("efrapq", cli, None)]
    parent = click.Context(cli, info_name="efrapq", max_content_width=100, terminal_width=100)
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        parts.append(_section(name, command, parent))
    return "\n".join(parts)


def _section(name: str, command: click.Command, parent: click.Context | None) -> str:
    context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
    title = "efrapq" if parent is None else f"efrapq {name}"
    return f"## {title}\n\n```\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
