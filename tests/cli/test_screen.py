"""Texts of machines and callers on the terminal: printed as they are, though they look like markup or emoji codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli import output
from shoal.cli.screen import NodeScreen
from shoal.node.options import checked
from shoal.node.ready import Ready
from shoal.node.tls.served import Trust

# Codes of pictures, as in a fingerprint, and of styles.
ODD = ":CD:ab:AB:ok:[bold]x[/bold][/]"


def test_the_ready_table_prints_fingerprint_and_paths_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = NodeScreen(checked(data_dir=tmp_path / ODD.replace("/", "")), as_json=False)
    trust = Trust(ca=ODD, name="x", fingerprint=ODD, has_own_ca=False)
    screen.ready(Ready("127.0.0.1:1", "127.0.0.1:2", Path(ODD), {ODD: 7}, trust=trust, key_file=Path(ODD)), 1.0)
    screen.trouble(ODD)
    shown = capsys.readouterr()
    assert shown.out.count(ODD) == 5
    assert ODD in shown.err


def test_half_a_surrogate_pair_is_printed_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print(output.printable("a\ud800"))
    output.show_json_line({"message": "a\ud800"})
    first, second = capsys.readouterr().out.splitlines()
    assert first == r"a\ud800"
    assert json.loads(second) == {"message": "a\ud800"}


def test_the_console_of_commands_prints_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print(f"model {ODD}")
    output.show((ODD,), [(ODD,)], title=ODD)
    output.show(("a",), [], title=ODD)
    assert capsys.readouterr().out.count(ODD) == 5
