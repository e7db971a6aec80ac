"""The command-line reference, generated from --help: `python -m efrapq.cli.reference > docs/CLI.md`."""

from __future__ import annotations

import click

from efrapq.cli.main import COMMANDS, cli

__all__ = ["reference"]

WIDTH = 100
HEAD = "# Command-line reference\n\nGenerated from `--help` by `python -m efrapq.cli.reference > docs/CLI.md`.\n"


def reference() -> str:
    """Markdown with the help of the group and of every command."""
    settings = dict(cli.context_settings) | {"max_content_width": WIDTH, "terminal_width": WIDTH}
    parent = click.Context(cli, info_name="efrapq", **settings)
    parts = [HEAD, _section("efrapq", parent)]
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH)
        parts.append(_section(f"efrapq {name}", context))
    return "\n".join(parts)


def _section(title: str, context: click.Context) -> str:
    return f"## {title}\n\n```\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
