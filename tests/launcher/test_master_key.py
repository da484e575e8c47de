"""The master key of a node: the operator's, or on a laptop one in the data folder."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mesh import keyring
from shoal.errors import InvalidArgument
from shoal.node import master_key


def written(path: Path, mode: int = 0o600) -> Path:
    path.write_text(keyring.new_master())
    path.chmod(mode)
    return path


def test_the_first_of_file_variable_credential_and_data_folder_counts(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("data", "run", "credentials")]
    for folder in folders:
        folder.mkdir()
    data, run, credentials = folders
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    own, source = master_key.find(environ, data, run)
    assert (own, source.startswith("data folder")) == (data / "master.key", True)
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    before = own.read_text()
    assert master_key.find(environ, data, run)[0].read_text() == before, "it is made once"
    credential = written(credentials / "shoal.master-key", 0o400)
    assert master_key.find(environ, data, run) == (credential, "systemd credential shoal.master-key")
    environ["SHOAL_MASTER_KEY"] = text = keyring.new_master().strip()
    found, source = master_key.find(environ, data, run)
    assert (found, source, found.read_text().strip()) == (run / "master.key", "variable SHOAL_MASTER_KEY", text)
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert "SHOAL_MASTER_KEY" not in environ, "no other process gets it"
    environ["SHOAL_MASTER_KEY_FILE"] = str(written(tmp_path / "k"))
    assert master_key.find(environ, data, run) == (tmp_path / "k", f"file {tmp_path / 'k'}")


@pytest.mark.parametrize("variable", ["SHOAL_MASTER_KEY_FILE", "SHOAL_MASTER_KEY"])
def test_what_is_no_master_key_is_refused_without_its_text(tmp_path: Path, variable: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        master_key.find({variable: "c2VjcmV0"}, tmp_path, tmp_path)
    assert "c2VjcmV0" not in caught.value.message or variable == "SHOAL_MASTER_KEY_FILE"
    with pytest.raises(InvalidArgument, match="can be read by others"):
        master_key.find({"SHOAL_MASTER_KEY_FILE": str(written(tmp_path / "open", 0o644))}, tmp_path, tmp_path)
