"""`shoal logs --set-level`: writes levels into the node's file, and waits until the node's processes go by them.

file ──once a second──> process ──time of the file that it goes by──> the node's page of metrics ──> this command
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from shoal.cli import admin_page, amounts
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable

_SERVICES = ("coord", "store", "infer", "ingest")
# Loggers of these have the names of modules.
_PACKAGES = ("kernels", "mesh", "services", "shoal")
DEFAULT = "DEFAULT"
"""Level of the command line that ends another one."""
_LONGEST_S = 7 * 86_400

# A process looks at the file once a second, and makes its page once a second; a restart takes several.
_WAIT_S = 10.0
_POLL_S = 0.2
_PROCESS_S = 2.0
_READ_S = 5.0
_UP, _TIME = "shoal_process_up", "shoal_log_levels_time_seconds"
_TARGET = f"/metrics?within={_PROCESS_S:g}&name[]={_UP}&name[]={_TIME}"


@dataclass(frozen=True)
class NotInForce:
    """A process in which the level is not in force, or of which that is not known."""

    process: str
    reason: str
    command: str
    """Shows more."""


@dataclass(frozen=True)
class Levels:
    """Result of the command."""

    level: str
    """`debug` ...; `default`: as configured."""
    logger: str
    """Empty: every logger that has no level of its own."""
    until: datetime | None
    """None: as configured."""
    in_force: list[str]
    not_in_force: list[NotInForce]

    @property
    def summary(self) -> str:
        """One line for the processes in which the level is in force, and two for each other one."""
        end = (
            "as configured again"
            if self.until is None
            else f"from {self.level.upper()} until {self.until.astimezone():%Y-%m-%d %H:%M:%S}"
        )
        lines = [f"{', '.join(self.in_force)}: {self.logger or 'everything'} is logged {end}"] if self.in_force else []
        for one in self.not_in_force:
            lines += [f"{one.process}: {one.reason}", f"        {one.command}"]
        return "\n".join(lines)


def set_levels(
    logs: Path, named: list[str] | None, wanted: Sequence[str], level: str, logger: str, lasting: str
) -> Levels:
    """Write the level of the processes `wanted` into the node's file, or remove it, and wait until it is in force.

    Args:
        logs: folder of the node's logs.
        named: processes and services of the command line; None: none.
        level: `DEFAULT` removes the level of the logger; without a logger, all levels.
        logger: empty: every logger that has no level of its own.
        lasting: an age, for which the level is in force.
    """
    from mesh.process.log_levels import TimedLevel, read, write
    from shoal.node import folder

    chosen = [name for name in wanted if name.rpartition("-")[0] in _SERVICES]
    if not chosen or (named and len(chosen) < len(wanted)):
        others = ", ".join(name for name in wanted if name not in chosen)
        raise InvalidArgument(f"--set-level {level.lower()}: only of {', '.join(_SERVICES)}, not of {others}")
    if logger.partition(".")[0] in _PACKAGES and not _is_module(logger):
        raise InvalidArgument(
            f"--logger {logger!r}: there is no such module; entries of `shoal logs --json` name theirs"
        )
    lasts_s = amounts.age(lasting, "--for").total_seconds()
    if lasts_s > _LONGEST_S:
        raise InvalidArgument(f"--for {lasting!r}: at most 7d; SHOAL_<SERVICE>_LOG_LEVEL sets a level for ever")
    now = time.time()
    until = now + lasts_s
    path = logs.parent / folder.LOG_LEVELS
    with folder.locked(logs):
        try:
            present = [one for one in read(path) if one.until > now]
        except ValueError:
            present = []
        ends_all = level == DEFAULT and not logger
        kept = [one for one in present if one.process not in chosen or not (ends_all or one.logger == logger)]
        new = [] if level == DEFAULT else [TimedLevel(name, logger, level, until) for name in chosen]
        write(path, [*kept, *new])
    in_force, not_in_force = _wait(path, chosen)
    end = None if level == DEFAULT else datetime.fromtimestamp(until, UTC)
    return Levels(level.lower(), logger, end, in_force, not_in_force)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _wait(path: Path, chosen: Sequence[str]) -> tuple[list[str], list[NotInForce]]:
    """Return the processes that go by the file, and the others of those `chosen`, once all do or after _WAIT_S."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        in_force, others = _look(path, chosen)
        if not others or not _runs(path.parent) or time.monotonic() > deadline:
            return in_force, others
        time.sleep(_POLL_S)


def _look(path: Path, chosen: Sequence[str]) -> tuple[list[str], list[NotInForce]]:
    """Return the processes of `chosen` that go by the file as it is now, and the others.

    Raises:
        NotFound: the running node has none of them: their logs are left from another start.
    """
    from shoal.rates import parse

    try:
        page = parse(admin_page.read(_admin(path.parent), _TARGET, timeout_s=_READ_S))
    except (Unavailable, ValueError) as err:
        reason = f"unknown: {err}; a process takes the level when it runs"
        return [], [NotInForce(name, reason, f"shoal doctor --data-dir {path.parent}") for name in chosen]
    up, times = ({name: value for (name,), value in page.by(each, ("instance",)).items()} for each in (_UP, _TIME))
    present = [name for name in chosen if name in up]
    if not present:
        raise NotFound(f"the running node has no process {', '.join(chosen)}: there are {', '.join(up)}")
    others = []
    for name in present:
        if not up[name]:
            reason = "not in force: it does not answer; it takes the level when it runs again"
            others.append(NotInForce(name, reason, f"shoal logs {name} --level warning"))
        elif name not in times:
            reason = "unknown: a process of its version does not say by which levels it goes; restart the node"
            others.append(NotInForce(name, reason, f"shoal logs {name} --contains log_level"))
        elif times[name] != path.stat().st_mtime:
            reason = "not in force: it answers, but has not taken the level"
            others.append(NotInForce(name, reason, f"shoal logs {name} --contains log_level"))
    missing = {one.process for one in others}
    return [name for name in present if name not in missing], others


def _admin(data_dir: Path) -> str:
    """Return the admin address of the node on a data folder. Raises Unavailable: none is ready."""
    from shoal.node import folder

    if not (admin := folder.ready_document(data_dir).get("admin")):
        raise Unavailable(f"no node is ready on {data_dir}")
    return str(admin)


def _runs(data_dir: Path) -> bool:
    from shoal.node import folder

    try:
        return bool(folder.running_in(data_dir))
    except FailedPrecondition:
        return False
