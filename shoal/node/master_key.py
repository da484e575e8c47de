"""Master key of the keyring for a node's coord: the operator's, or on a laptop one in the data folder.

$SHOAL_MASTER_KEY_FILE  ->  $SHOAL_MASTER_KEY  ->  systemd credential shoal.master-key  ->  DATA_DIR/master.key
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from mesh import keyring
from mesh.process.files import write_atomically
from shoal.errors import InvalidArgument

FILE_VARIABLE = "SHOAL_MASTER_KEY_FILE"
VARIABLE = "SHOAL_MASTER_KEY"
CREDENTIAL = "shoal.master-key"
IN_DATA_FOLDER = "data folder, beside what it protects: give another one with SHOAL_MASTER_KEY_FILE"


def find(environ: MutableMapping[str, str], data_dir: Path, run_dir: Path) -> tuple[Path, str]:
    """Return the file of the master key, and where the key comes from, for people.

    The variable is removed from `environ`: only coord gets the key, by a file in `run_dir`.

    Raises:
        InvalidArgument: the file or the variable has no master key, or others can read the file.
    """
    text = environ.pop(VARIABLE, "")
    if file := environ.get(FILE_VARIABLE):
        found, source = Path(file).expanduser().absolute(), f"file {file}"
    elif text:
        keyring.check_text(text, VARIABLE)
        found, source = run_dir / "master.key", f"variable {VARIABLE}"
        write_atomically(found, text + "\n", is_private=True)
    elif (folder := environ.get("CREDENTIALS_DIRECTORY")) and (Path(folder) / CREDENTIAL).exists():
        found, source = Path(folder) / CREDENTIAL, f"systemd credential {CREDENTIAL}"
    else:
        found, source = data_dir / "master.key", IN_DATA_FOLDER
        if not found.exists():
            write_atomically(found, keyring.new_master(), is_private=True)
    try:
        keyring.read(found)
    except InvalidArgument as err:
        raise InvalidArgument(f"--auth: {err.message}") from err
    return found, source
