"""Private folders: removed at their end, or at the next start after a kill; others' folders are left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mesh.process.private_folder import PrivateFolder

_LEAVES = """
import os, sys
from mesh.process.private_folder import PrivateFolder
(PrivateFolder("shoal-tmp-x-", sys.argv[1]).path / "file").write_text("left")
os.kill(os.getpid(), 9)
"""


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _LEAVES, str(tmp_path)], check=False)
    assert [entry.name[:12] for entry in tmp_path.iterdir()] == ["shoal-tmp-x-"]
    with PrivateFolder("shoal-tmp-x-", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_only_unlocked_private_folders_of_the_same_kind_are_removed(tmp_path: Path) -> None:
    (tmp_path / "shoal-tmp-y-other").mkdir(mode=0o700)
    (tmp_path / "shoal-tmp-x-open").mkdir()
    (tmp_path / "shoal-tmp-x-open").chmod(0o755)
    (tmp_path / "shoal-tmp-x-link").symlink_to(tmp_path)
    held = PrivateFolder("shoal-tmp-x-", tmp_path)
    before = set(tmp_path.iterdir())
    with PrivateFolder("shoal-tmp-x-", tmp_path) as folder:
        assert set(tmp_path.iterdir()) == before | {folder}
        assert folder.stat().st_mode & 0o777 == 0o700
    held.close()
    held.close()
    assert set(tmp_path.iterdir()) == before - {held.path}
