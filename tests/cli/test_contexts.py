"""`shoal context`: gateways by name, in a file of the user; tokens are never printed."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli import context, contexts
from shoal.cli.context import app
from shoal.cli.contexts import Context, Contexts, chosen
from shoal.cli.output import connect
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from tests.certificates import ca_in

SECRET = "tok-3f9a"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without nodes, variables and contexts."""
    for variable in ("SHOAL_GATEWAY", "SHOAL_TOKEN", "SHOAL_CA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def run(*arguments: str, stdin: str | None = None) -> str:
    """The output of `shoal context ...`; an error is raised."""
    done = CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False, standalone_mode=False)
    assert SECRET not in done.output
    if done.exception is not None:
        raise done.exception
    return done.output


def token_file(folder: Path) -> Path:
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(SECRET + "\n")
    return file


def test_the_first_context_is_used_and_another_by_name(home: Path) -> None:
    ca, file = ca_in(home).path, token_file(home)
    assert "in use" in run("add", "prod", "https://h.example:8443", "--ca", str(ca), "--token-file", str(file))
    assert "in use" not in run("add", "dev", "127.0.0.1:8080")
    with connect(None) as client:
        assert client.address == "https://h.example:8443"
    with connect("dev") as client:
        assert client.address == "127.0.0.1:8080"
    run("use", "dev")
    with connect(None) as client:
        assert client.address == "127.0.0.1:8080"
    run("use")
    with pytest.raises(NotFound, match="no node is running"):
        connect(None)


def test_an_address_and_the_variable_have_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", "prod", "https://h.example:8443")
    monkeypatch.setenv("SHOAL_GATEWAY", "127.0.0.1:2")
    with connect(None) as client:
        assert client.address == "127.0.0.1:2"
    with connect("127.0.0.1:1") as client:
        assert client.address == "127.0.0.1:1"
    with connect("prod") as client:
        assert client.address == "https://h.example:8443"


def test_a_token_that_no_header_carries_is_refused_when_it_is_added(home: Path) -> None:
    file = token_file(home)
    file.write_text("tok en\n")
    for given, stdin in ((str(file), None), ("-", "tok en\n")):
        with pytest.raises(InvalidArgument, match="has characters that no header carries"):
            run("add", "kept", "https://h.example:8443", "--token-file", given, stdin=stdin)


def test_a_list_shows_that_a_token_is_set_and_never_the_token(home: Path) -> None:
    run("add", "kept", "https://h.example:8443", "--token-file", "-", stdin=SECRET)
    run("add", "read", "https://h.example:8443", "--token-file", str(token_file(home)))
    assert [line.split()[-1] for line in run("list").splitlines() if "kept" in line] != [SECRET]
    rows = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert (rows["kept"]["token"], rows["read"]["token"]) == ("set", str(home / "token"))
    assert rows["kept"]["in_use"]
    assert contexts.load({"XDG_CONFIG_HOME": str(home / "config")}).get("kept").read_token() == SECRET
    assert SECRET not in repr(Context("u", token=SECRET))


def test_the_file_is_the_users_own(home: Path) -> None:
    run("add", "a", "127.0.0.1:1")
    file = home / "config" / "shoal" / "contexts.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    with pytest.raises(FailedPrecondition, match=r"other users can read .*chmod 600"):
        run("list")
    file.chmod(0o600)
    file.write_text("{")
    with pytest.raises(FailedPrecondition, match="it is damaged"):
        connect(None)


def test_mistakes_are_named(home: Path) -> None:
    run("add", "a", "127.0.0.1:1")
    with pytest.raises(AlreadyExists, match="'a' already: give --replace"):
        run("add", "a", "127.0.0.1:2")
    run("add", "a", "127.0.0.1:2", "--replace")
    for arguments, named in (
        (("add", "a:b", "127.0.0.1:1"), "letters, digits"),
        (("add", "b", "nowhere"), "URL='nowhere' is no address"),
        (("add", "b", "127.0.0.1:1", "--ca", str(home)), "--ca is for https"),
        (("add", "b", "https://h:1", "--ca", str(home / "none")), "no such file"),
        (("add", "b", "https://h:1", "--token-file", str(home / "none")), "cannot be read: No such file"),
        (("add", "b", "https://h:1", "--token-file", "-"), "standard input is empty"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            run(*arguments, stdin="")
    with pytest.raises(
        InvalidArgument, match=r"--gateway='z': no context is called so \(there are a\), and an address has"
    ):
        connect("z")
    for command in ("use", "remove"):
        with pytest.raises(NotFound, match="no context is called 'z': there are a"):
            run(command, "z")


def test_a_token_that_others_can_read_is_refused(home: Path) -> None:
    file = token_file(home)
    run("add", "a", "https://h.example:1", "--token-file", str(file))
    file.chmod(0o644)
    with pytest.raises(InvalidArgument, match=r"other users can read the token file .*chmod 600"):
        connect("a")
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(InvalidArgument, match="is empty"):
        connect("a")


def test_a_token_is_not_sent_in_plaintext_to_another_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", "far", "10.0.0.1:80", "--token-file", str(token_file(home)))
    with pytest.raises(InvalidArgument, match=r"not sent to 10\.0\.0\.1:80 in plaintext: use https") as caught:
        connect("far")
    assert SECRET not in caught.value.message
    monkeypatch.setenv("SHOAL_TOKEN", SECRET)
    with pytest.raises(InvalidArgument, match="in plaintext"):
        connect("10.0.0.1:80")
    connect("127.0.0.1:80").close()


def test_removing_the_context_in_use_leaves_none_in_use_and_says_so(home: Path) -> None:
    run("add", "c", "127.0.0.1:1")
    run("add", "d", "127.0.0.1:2")
    assert run("remove", "d") == "context d is removed\n"
    assert "no context is in use" in run("remove", "c")
    both = Contexts("a", {"a": Context("127.0.0.1:1"), "b": Context("127.0.0.1:2")})
    assert both.removing("a") == Contexts("", {"b": Context("127.0.0.1:2")})
    assert both.removing("b").current == "a"
    assert chosen(None, {"XDG_CONFIG_HOME": "/none"}) is None


def test_contexts_that_are_added_at_the_same_time_are_all_kept(home: Path) -> None:
    names = [f"c{number}" for number in range(32)]
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: context.add(name, "127.0.0.1:1"), names))
    assert sorted(contexts.load(os.environ).contexts) == sorted(names)
