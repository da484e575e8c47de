"""`make demo`: classify real files by type with a real node and a real model, and check every answer.

    bytes of a file ──> filetypes: windows ──> magika's ONNX file ──> names ──> label, score       (models/)

    shoal up ──> push the models ──> each file is classified twice:
        at once        by ModelInfer through the gateway, many calls in flight, so that batches form
        as a job       submitted to ingest, run by infer, with the result read from the store
    each answer is compared with the magika package's own answer, and both answers with each other.

Exits with 0 when all agree, and with 1 when an answer differs or the node fails. All files are removed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

import shoal
from examples import repository
from examples.filetypes.files import Sample, gather
from examples.node import NotReady, log_tails, running, wait_until_ready
from shoal.client import JobRequest
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from examples.filetypes.judge import Judge, Verdict

MODEL = "filetypes"
# Parameter of a response with the batch size of the ensemble's second step, magika's model.
STEP = "step_1_batch_size"

# Calls in flight: enough for a replica to always have several calls to batch.
AT_ONCE = 32

# In a batch of another size, the order of float32 sums differs, with an effect below 1e-6. The difference is larger for
# a row that runs alone: see Judge.together.
TOLERANCE = 1e-4

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    ROOT,
    Path(sysconfig.get_path("purelib")),
    Path("/usr/bin"),
    Path("/usr/share"),
    Path("/usr/lib"),
)


@dataclass(frozen=True)
class Question:
    """A file, with magika's own answers."""

    sample: Sample
    own_together: Verdict
    """magika's answer when the model runs for many files together."""
    judge: Judge

    @cached_property
    def own_alone(self) -> Verdict:
        """magika's answer when the model runs for this file alone."""
        return self.judge.alone(self.sample.content)

    @property
    def inputs(self) -> dict[str, Any]:
        return {"file": np.array([[self.sample.content]], object)}

    def own(self, answer: Answer) -> Verdict:
        """Return magika's answer from the same kind of run, alone or together."""
        return self.own_alone if answer.is_alone else self.own_together

    def is_right(self, answer: Answer) -> bool:
        """Return True when the node's answer agrees with magika's."""
        return agrees(self.own(answer), answer.verdict)

    def is_same(self, one: Answer, other: Answer) -> bool:
        """Return True when two answers of the node agree.

        If only one of the two ran alone, each must agree with magika's answer of the same kind of run.
        """
        if one.is_alone == other.is_alone:
            return agrees(one.verdict, other.verdict)
        return self.is_right(one) and self.is_right(other)


@dataclass(frozen=True)
class Answer:
    """Answer of the node for one file."""

    verdict: Verdict
    replica: str
    batch_size: int
    latency_ms: float

    @property
    def is_alone(self) -> bool:
        """True when the file was the only row of its batch."""
        return self.batch_size == 1


def main() -> int:
    """Run the demo, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=120, help="number of files (at least 1)")
    count = max(parser.parse_args().files, 1)
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 140
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-demo-") as folder:
            return _in_folder(Path(folder), count, out)
    except NotReady as err:
        out.print(Text(str(err), "red"))
    except ShoalError as err:
        out.print(Text(f"the demo failed: {err.message}", "red"))
    except (KeyboardInterrupt, RuntimeError) as err:
        # ONNX Runtime raises an interrupt during its calls as a RuntimeError with a cause.
        interruption = err.__cause__ if isinstance(err, RuntimeError) else err
        if isinstance(interruption, SystemExit):
            raise interruption from None
        if not isinstance(interruption, KeyboardInterrupt):
            raise
        out.print("interrupted: the node is stopped")
        return 130
    return 1


def _in_folder(folder: Path, count: int, out: Console) -> int:
    started = time.monotonic()
    # Temporary files of other packages are removed with the folder. ONNX Runtime writes some when it is imported.
    os.environ["TMPDIR"] = str(folder)
    from examples.filetypes.judge import Judge

    out.print("starting a node: shoal up --replicas infer=2")
    with running(folder, "--replicas", "infer=2") as process:
        judge = Judge()
        questions, by_rule = prepare(judge, count)
        gateway = wait_until_ready(process, folder)
        out.print(f"ready at {gateway} after {time.monotonic() - started:.1f} s")
        try:
            models = build(folder / "models", judge)
            result = asyncio.run(_ask(gateway, models, judge, questions, out))
        except ShoalError:
            out.print(Text(log_tails(folder), "dim"))
            raise
    status = report(questions, *result, by_rule, out)
    out.print(f"the node has stopped; {time.monotonic() - started:.1f} s in all")
    return status


def build(into: Path, judge: Judge) -> Path:
    """Write the model repository: the configurations of models/, magika's ONNX file, the names of its classes."""
    labels = "".join(f"{label}\n" for label in judge.labels).encode()
    files = {"filetypes_magika/1/model.onnx": judge.model, "filetypes_names/1/labels.txt": labels}
    return repository.build(Path(__file__).parent / "models", into, files)


def prepare(judge: Judge, count: int) -> tuple[list[Question], int]:
    """Return `count` questions, and the number of skipped files, which magika answers by rule, without the model."""
    samples: list[Sample] = []
    rows: list[NDArray[np.int32]] = []
    by_rule = 0
    for sample in gather(FOLDERS, count * 2):
        features = judge.features(sample.content)
        if features is None:
            by_rule += 1
            continue
        samples.append(sample)
        rows.append(features)
        if len(samples) == count:
            break
    own = judge.together(rows)
    return [Question(*each, judge) for each in zip(samples, own, strict=True)], by_rule


async def _ask(
    gateway: str, models: Path, judge: Judge, questions: Sequence[Question], out: Console
) -> tuple[list[Answer], list[Answer], float, float]:
    """Return the answers at once and those of the jobs, and the seconds for all of each kind."""
    async with shoal.AsyncClient(gateway) as client:
        start = time.monotonic()
        pushed = await client.models.push(models)
        out.print(
            f"pushed {', '.join(each.model.name for each in pushed)} "
            f"({sum(each.sent_bytes for each in pushed) / 2**20:.1f} MiB): "
            f"warm on every replica after {time.monotonic() - start:.1f} s"
        )
        start = time.monotonic()
        answers = await at_once(client, judge, questions)
        between = time.monotonic()
        jobs = await as_jobs(client, judge, questions)
        return answers, jobs, between - start, time.monotonic() - between


async def at_once(client: shoal.AsyncClient, judge: Judge, questions: Sequence[Question]) -> list[Answer]:
    """Classify every file by a direct call, with AT_ONCE calls in flight."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(question: Question) -> Answer:
        async with slots:
            start = time.monotonic()
            result = await client.infer(MODEL, question.inputs, parameters={"explain": True})
            return answer_of(judge, result, time.monotonic() - start)

    return await asyncio.gather(*(ask(question) for question in questions))


async def as_jobs(client: shoal.AsyncClient, judge: Judge, questions: Sequence[Question]) -> list[Answer]:
    """Submit every file as a job, and read each result from the store."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def collect(job_id: str, submitted: float) -> Answer:
        async with slots:
            result = await client.jobs.result(job_id, timeout=60)
            return answer_of(judge, result, time.monotonic() - submitted)

    requests = [
        JobRequest(MODEL, question.inputs, parameters={"explain": True}, labels={"file": question.sample.name[:256]})
        for question in questions
    ]
    collecting: dict[int, asyncio.Task[Answer]] = {}
    async with asyncio.TaskGroup() as group:
        async for ack in client.jobs.submit_many(requests):
            if ack.error is not None:
                raise ack.error
            collecting[ack.index] = group.create_task(collect(ack.job_id, time.monotonic()))
    return [collecting[index].result() for index in range(len(questions))]


def answer_of(judge: Judge, result: shoal.InferResult, seconds: float) -> Answer:
    """Return the answer in a result of one row."""
    return Answer(
        verdict=judge.of_guess(result["label"].item().decode(), result["score"].item()),
        replica=str(result.parameters.get("replica", "?")),
        batch_size=int(result.parameters.get(STEP, 0)),
        latency_ms=seconds * 1000,
    )


def report(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    jobs: Sequence[Answer],
    took_s: float,
    jobs_took_s: float,
    by_rule: int,
    out: Console,
) -> int:
    """Print the table and the summary; return 0 when everything agrees, else 1."""
    _print_table(questions, answers, jobs, out)
    right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    jobs_right = [question.is_right(answer) for question, answer in zip(questions, jobs, strict=True)]
    same = [question.is_same(one, other) for question, one, other in zip(questions, answers, jobs, strict=True)]
    count = len(questions)
    kinds = Counter(answer.verdict.label for answer in answers)
    out.print(f"{count} files of {len(kinds)} types: {', '.join(f'{k} {n}' for k, n in kinds.most_common(12))} ...")
    if by_rule:
        out.print(f"{by_rule} more were skipped: magika answers them by rule, without the model")
    out.print(f"at once:  {_pace(answers, took_s)}")
    out.print(f"as jobs:  {_pace(jobs, jobs_took_s)}")
    for what, verdicts in (
        ("at once agree with magika", right),
        ("as jobs agree with magika", jobs_right),
        ("as jobs agree with those at once", same),
    ):
        out.print(Text(f"{sum(verdicts)} of {count} answers {what}", "green" if all(verdicts) else "bold red"))
    failed = [n for n in range(count) if not (right[n] and jobs_right[n] and same[n])]
    for n in failed:
        out.print(Text(questions[n].sample.name, "red"), soft_wrap=True)
        for what, verdict in (
            ("magika, alone", questions[n].own_alone),
            ("magika, in a batch", questions[n].own_together),
            (f"at once, in a batch of {answers[n].batch_size}", answers[n].verdict),
            (f"as a job, in a batch of {jobs[n].batch_size}", jobs[n].verdict),
        ):
            guess = f"{verdict.label} (the model: {verdict.model_label} {verdict.score:.6f})"
            out.print(Text(f"    {what}: {guess}", "red"), soft_wrap=True)
    return 1 if failed else 0


def agrees(one: Verdict, other: Verdict) -> bool:
    """Return True for the same type, from the same guess, with the same score within TOLERANCE."""
    same = one.label == other.label and one.model_label == other.model_label
    return same and abs(one.score - other.score) <= TOLERANCE


def _pace(answers: Sequence[Answer], took_s: float) -> str:
    replicas = Counter(answer.replica for answer in answers)
    share = ", ".join(f"{name} {n}" for name, n in sorted(replicas.items()))
    batch = sum(answer.batch_size for answer in answers) / len(answers)
    rate = len(answers) / took_s
    return f"{took_s:.2f} s ({rate:.0f} files/s), in batches of {batch:.1f} on average, by {share}"


def _print_table(
    questions: Sequence[Question], answers: Sequence[Answer], jobs: Sequence[Answer], out: Console
) -> None:
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("file", overflow="ellipsis", no_wrap=True, max_width=60)
    table.add_column("type")
    for column in ("score", "replica", "batch", "ms", "job ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for question, answer, job in zip(questions, answers, jobs, strict=True):
        agree = question.is_right(answer) and question.is_right(job)
        table.add_row(
            Text(_short(question.sample.name)),
            answer.verdict.label,
            f"{answer.verdict.score:.4f}",
            answer.replica,
            str(answer.batch_size),
            f"{answer.latency_ms:.1f}",
            f"{job.latency_ms:.1f}",
            style="" if agree else "red",
        )
    out.print(table)


def _short(name: str) -> str:
    """Return a path of up to 60 characters, cut at its beginning, which says less than its end."""
    name = name.removeprefix(f"{ROOT}/")
    return name if len(name) <= 60 else f"…{name[-59:]}"


if __name__ == "__main__":
    sys.exit(main())
