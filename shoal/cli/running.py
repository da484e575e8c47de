"""`shoal jobs run`: a stream of jobs from lines, their results as lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import Gateway, connect, plain, show_json_line
from shoal.errors import Code, InvalidArgument, NotFound, ShoalError

if TYPE_CHECKING:
    from shoal.client import JobRequest, ModelMetadata, Ran


def run(
    model: Annotated[str, typer.Argument(help="The model to ask.")],
    written: Annotated[str, typer.Argument(metavar="FILE", help="JSON Lines, or - for standard input.")] = "-",
    version: Annotated[str, typer.Option(metavar="V", help="Ask this version.", show_default=False)] = "",
    tenant: Annotated[
        str, typer.Option(metavar="NAME", help="Whose jobs. Default: the default tenant.", show_default=False)
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            metavar="PREFIX",
            help="Idempotency keys PREFIX-<line>: run again after a break, every line keeps its job.",
            show_default=False,
        ),
    ] = "",
    window: Annotated[int, typer.Option(metavar="N", min=1, help="Jobs without a result at once.")] = 256,
    gateway: Gateway = None,
) -> None:
    """Run each line of a file as a durable job, and print the results as they come, one line of JSON each.

    A line is what `shoal infer` takes as INPUT. Results carry the number of their line, from 1; a line that fails has
    an error instead of an answer, and the others go on. Exits 1 when one failed. A node that restarts is waited for.

    [bold]Examples[/bold]

      shoal jobs run digits rows.jsonl > answers.jsonl

      tail -f events.jsonl | shoal jobs run digits - --key today
    """
    from shoal.cli import tensors

    failed = answered = 0
    with _lines(written) as lines, connect(gateway, tenant=tenant) as client:
        asked = Asked(lines, model, version, key, client.models.metadata(model, version))
        for ran in client.jobs.run_many(asked.requests(), window=window):
            line = asked.line_of(ran)
            if ran.result is not None:
                answered += 1
                show_json_line({"line": line, "job": ran.job_id, "answer": plain(tensors.as_document(ran.result))})
            else:
                failed += 1
                _show_error(line, ran.job_id, ran.error or ShoalError("no result"))
    failed += asked.refused
    if sys.stderr.isatty():
        typer.echo(f"{answered + failed} lines: {answered} answered, {failed} failed", err=True)
    if failed:
        raise typer.Exit(1)


class Asked:
    """The requests of the lines. A line that is none is answered at once."""

    def __init__(self, lines: IO[str], model: str, version: str, key: str, metadata: ModelMetadata) -> None:
        self._lines = lines
        self._model = model
        self._version = version
        self._key = key
        self._metadata = metadata
        self._numbers: dict[int, int] = {}
        self._next = 0
        self.refused = 0

    def requests(self) -> Iterator[JobRequest]:
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                continue
            try:
                request = self._request(line, number)
            except ShoalError as err:
                self.refused += 1
                _show_error(number, "", err)
                continue
            self._numbers[self._next] = number
            self._next += 1
            yield request

    def line_of(self, ran: Ran) -> int:
        """The number of the line that a result belongs to. Asked once."""
        return self._numbers.pop(ran.index)

    def _request(self, line: str, number: int) -> JobRequest:
        from shoal.cli import tensors
        from shoal.client import JobRequest

        given = tensors.of_line(line, f"line {number}")
        ready = tensors.fit(given, self._metadata)
        return JobRequest(
            self._model,
            ready.inputs,
            outputs=given.outputs,
            version=self._version,
            parameters=given.parameters,
            request_id=given.request_id,
            datatypes=ready.datatypes,
            idempotency_key=f"{self._key}-{number}" if self._key else "",
        )


def _lines(written: str) -> IO[str]:
    if written == "-":
        return sys.stdin
    try:
        return Path(written).open(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise NotFound(f"{written}: no such file") from None
    except OSError as err:
        raise InvalidArgument(f"cannot read {written}: {err.strerror}") from err


def _show_error(line: int, job_id: str, error: ShoalError) -> None:
    about: dict[str, Any] = {"line": line}
    if job_id:
        about["job"] = job_id
    show_json_line({**about, "error": {"code": Code(error.code).name, "message": error.message}})
