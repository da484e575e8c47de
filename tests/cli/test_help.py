"""Help of the commands."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from shoal.cli.main import app


def commands(command: Any, path: str) -> dict[str, Any]:
    """Return the commands without subcommands, by what a user types."""
    if not hasattr(command, "list_commands"):
        return {path: command}
    found: dict[str, Any] = {}
    for name in command.list_commands(None):
        found |= commands(command.get_command(None, name), f"{path} {name}")
    return found


def has_example(path: str, command: Any) -> bool:
    # Examples are indented.
    return any(line.startswith("  ") and path in line for line in (command.help or "").splitlines())


def test_the_help_of_every_command_has_an_example() -> None:
    found = commands(get_command(app), "shoal")
    assert len(found) > 60
    assert [path for path, command in found.items() if not has_example(path, command)] == []
