"""`shoal jobs run`: jobs from the lines of a file, results as lines."""

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
    model: Annotated[str, typer.Argument(help="The model to run.")],
    written: Annotated[str, typer.Argument(metavar="FILE", help="JSON Lines, or - for standard input.")] = "-",
    version: Annotated[str, typer.Option(metavar="V", help="Version to run.", show_default=False)] = "",
    tenant: Annotated[
        str, typer.Option(metavar="NAME", help="Tenant of the jobs. Default: the default tenant.", show_default=False)
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            metavar="PREFIX",
            help="Idempotency keys PREFIX-<line>: a repeated run gives every line its first job.",
            show_default=False,
        ),
    ] = "",
    window: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of jobs without result.")] = 256,
    gateway: Gateway = None,
) -> None:
    """Run each line of a file as a durable job, and print the results as they arrive, one line of JSON each.

    A line is what `shoal infer` takes as INPUT. Results carry the number of their line, from 1. A failed line has an
    error in place of an answer, and the others continue. Exits 1 when a line failed. The command waits for a node that
    restarts.

    [bold]Examples[/bold]

      shoal jobs run digits rows.jsonl > answers.jsonl

      tail -f events.jsonl | shoal jobs run digits - --key today
    """
    from shoal.cli import tensors

    failed = succeeded = 0
    with _lines(written) as lines, connect(gateway, tenant=tenant) as client:
        requests = RequestLines(lines, model, version, key, client.models.metadata(model, version))
        for ran in client.jobs.run_many(requests.requests(), window=window):
            line = requests.line_of(ran)
            if ran.result is not None:
                succeeded += 1
                show_json_line({"line": line, "job": ran.job_id, "answer": plain(tensors.as_document(ran.result))})
            else:
                failed += 1
                _show_error(line, ran.job_id, ran.error or ShoalError("no result"))
    failed += requests.rejected
    if sys.stderr.isatty():
        typer.echo(f"{succeeded + failed} lines: {succeeded} succeeded, {failed} failed", err=True)
    if failed:
        raise typer.Exit(1)


class RequestLines:
    """Requests from lines. The error of an invalid line is printed immediately."""

    def __init__(self, lines: IO[str], model: str, version: str, key: str, metadata: ModelMetadata) -> None:
        self._lines = lines
        self._model = model
        self._version = version
        self._key = key
        self._metadata = metadata
        self._numbers: dict[int, int] = {}
        self._next = 0
        self.rejected = 0

    def requests(self) -> Iterator[JobRequest]:
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                continue
            try:
                request = self._request(line, number)
            except ShoalError as err:
                self.rejected += 1
                _show_error(number, "", err)
                continue
            self._numbers[self._next] = number
            self._next += 1
            yield request

    def line_of(self, ran: Ran) -> int:
        """Return the line number of a result. Call it once for each result."""
        return self._numbers.pop(ran.index)

    def _request(self, line: str, number: int) -> JobRequest:
        from shoal.cli import tensors
        from shoal.client import JobRequest

        request = tensors.of_line(line, f"line {number}")
        ready = tensors.fit(request, self._metadata)
        return JobRequest(
            self._model,
            ready.inputs,
            outputs=request.outputs,
            version=self._version,
            parameters=request.parameters,
            request_id=request.request_id,
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
