"""Levels of loggers that the file of `shoal logs --set-level` sets for a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.process.log_levels import LogLevels, TimedLevel, read, write

ROOT, TIDE, POOL = logging.getLogger(), logging.getLogger("tide"), logging.getLogger("tide.pool")


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    """Loggers as a process with the level INFO has them, of which one library's has a level of its own."""
    before = [(logger, logger.level) for logger in (ROOT, TIDE, POOL)]
    for logger, level in ((ROOT, logging.INFO), (TIDE, logging.WARNING), (POOL, logging.NOTSET)):
        logger.setLevel(level)
    yield
    for logger, level in before:
        logger.setLevel(level)


def levels() -> tuple[int, int, int]:
    return ROOT.level, TIDE.level, POOL.level


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [f"{record.args['event']} {record.args.get('target')}" for record in caplog.records]
    caplog.clear()
    return found


def test_a_level_holds_for_its_process_and_its_logger_until_its_time_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log_levels.json"
    mine = LogLevels(path, "infer-0")
    mine.check(1.0)
    write(path, [TimedLevel("infer-0", "tide.pool", "DEBUG", 20.0), TimedLevel("infer-1", "", "DEBUG", 20.0)])
    mine.check(1.0)
    assert levels() == (logging.INFO, logging.WARNING, logging.DEBUG)
    # A second command adds a level, and makes the first one last longer.
    write(path, [TimedLevel("infer-0", "tide.pool", "DEBUG", 30.0), TimedLevel("infer-0", "", "ERROR", 20.0)])
    mine.check(2.0)
    assert levels() == (logging.ERROR, logging.WARNING, logging.DEBUG)
    assert events(caplog) == ["log_level.set tide.pool"] * 2 + ["log_level.set everything"]
    mine.check(20.0)
    assert levels() == (logging.INFO, logging.WARNING, logging.DEBUG)
    mine.check(30.0)
    assert levels() == (logging.INFO, logging.WARNING, logging.NOTSET)
    mine.check(31.0)
    assert events(caplog) == ["log_level.restored everything", "log_level.restored tide.pool"]


def test_a_level_that_is_removed_from_the_file_ends_and_so_does_one_whose_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "log_levels.json"
    mine = LogLevels(path, "infer-0")
    for remove in (lambda: write(path, []), path.unlink):
        write(path, [TimedLevel("infer-0", "", "DEBUG", 20.0), TimedLevel("infer-0", "tide", "DEBUG", 20.0)])
        mine.check(1.0)
        assert levels() == (logging.DEBUG, logging.DEBUG, logging.NOTSET)
        remove()
        mine.check(1.0)
        assert levels() == (logging.INFO, logging.WARNING, logging.NOTSET)


def test_a_process_says_by_which_file_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "log_levels.json"
    mine = LogLevels(path, "infer-0")
    mine.check(1.0)
    assert LogLevels.file_time_s == 0
    for level in ("DEBUG", "ERROR"):
        write(path, [TimedLevel("infer-0", "", level, 20.0)])
        mine.check(1.0)
        assert (LogLevels.file_time_s, logging.getLevelName(ROOT.level)) == (path.stat().st_mtime, level)
    taken = LogLevels.file_time_s
    path.write_text("{}")
    os.utime(path, (5.0, 5.0))
    mine.check(1.0)
    assert LogLevels.file_time_s == taken, "it goes by a file that it cannot read"


ENDLESS = '{"levels": [{"process": "infer-0", "logger": "", "level": "DEBUG", "until": %s}]}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", '{"levels": 1}', '{"levels": [{"process": "infer-0"}]}', '{"levels": [1]}'),
        *(ENDLESS % until for until in ("Infinity", "NaN", "1e300", "1e12")),
    ],
)
def test_a_file_of_another_form_changes_nothing_and_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "log_levels.json"
    write(path, [TimedLevel("infer-0", "tide", "ERROR", 20.0)])
    mine = LogLevels(path, "infer-0")
    mine.check(1.0)
    caplog.clear()
    (tmp_path / "new").write_text(text)
    (tmp_path / "new").replace(path)
    mine.check(1.0)
    mine.check(1.0)
    assert levels() == (logging.INFO, logging.ERROR, logging.NOTSET)
    assert events(caplog) == ["log_level.file_ignored None"]


def test_a_level_that_logging_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log_levels.json"
    write(path, [TimedLevel("infer-0", "", "LOUD", 20.0)])
    with pytest.raises(ValueError, match="'LOUD' is no level"):
        read(path)
