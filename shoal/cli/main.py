"""Root of the command line: the list of commands, and the display of errors.

A command's module is imported when the command is run or listed, and imports heavy packages only when it runs:
`shoal --help` must be fast.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from shoal import __version__, own_packages
from shoal.cli.output import printable
from shoal.errors import InvalidArgument, ShoalError

COMMANDS = (
    "up",
    "serve",
    "models",
    "infer",
    "jobs",
    "tenants",
    "results",
    "store",
    "status",
    "instances",
    "logs",
    "top",
    "trace",
    "doctor",
    "support",
    "context",
    "ca",
    "keys",
    "policy",
    "audit",
)
"""Each command is `app` of the module of that name in shoal.cli; the order is the one for newcomers."""


class Commands(TyperGroup):
    """Group of the commands, each imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = get_command(importlib.import_module(f"shoal.cli.{cmd_name}").app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A complete, self-hosted backend for AI applications: inference, durable jobs, storage and a service mesh.

    [bold]First steps[/bold]

      shoal up                                      start everything on this machine

      shoal models push digits.onnx                 (in another terminal) push a model

      shoal infer digits '{"x": [[1, 2, 3, 4]]}'    run it
    """


def main() -> None:
    """Run the command line. Exits 0 on success, 2 for a wrong command line, 1 for other errors."""
    own_packages.exit_when_foreign()
    try:
        app(prog_name="shoal")
    except ShoalError as err:
        print(f"shoal: {printable(err.message)}", file=sys.stderr)
        if err.trace_id:
            print(f"trace: shoal trace {err.trace_id}", file=sys.stderr)
        sys.exit(2 if isinstance(err, InvalidArgument) else 1)
    except OSError as err:
        # A full disk, or a file that cannot be read or written.
        print(f"shoal: {err}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
