"""Jobs on a pool of processes, or on Apache Beam; each leaves its result in a file of its own."""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from etils import epath

from pangu_tiny.errors import UserError, check_number
from pangu_tiny.progress import Progress

UNITS = "units"
"""The folder of results below a stage's workdir; it goes when the stage is done."""


class Workers:
    """Who does the jobs of a stage.

    Attributes:
      processes: of this machine; None is one for each core.
      runner: the name of a Beam runner, which does them instead.
      options: its flags, as on a Beam command line.
    """

    def __init__(
        self,
        stage: str,
        processes: int | None,
        runner: str | None = None,
        options: Sequence[str] | None = None,
    ):
        check_number(f"{stage}.processes", processes, 1)
        if options and runner is None:
            raise UserError(f"{stage}.runner_options are those of a runner, expected one too")
        self.processes, self.runner, self.options = processes, runner, options or ()


@dataclasses.dataclass(frozen=True)
class Job:
    """A share of a stage's work, which can be pickled. The kinds of it have `size`, bytes of text
    or of whatever the work grows with, and `run(shared)`, which writes the file `result`, last and
    atomically, so that a job whose result exists is done."""

    SUFFIX: ClassVar[str] = ".json"

    index: int
    workdir: str

    @property
    def result(self) -> epath.Path:
        return epath.Path(self.workdir) / UNITS / f"{self.index:05d}{self.SUFFIX}"


def run_jobs(jobs: Sequence[Any], shared: Any, workers: Workers, label: str) -> None:
    """Runs the jobs that have no result yet; `shared` is given to every job, and pickled once for
    a process."""
    jobs[0].result.parent.mkdir(exist_ok=True)
    todo = [job for job in jobs if not job.result.exists()]
    if workers.runner is None:
        done = sum(job.size for job in jobs) - sum(job.size for job in todo)
        run_here(todo, shared, workers.processes, label, done)
    elif todo:
        from pangu_tiny.beam import run_on_beam  # Beam is large, and optional

        run_on_beam(todo, shared, workers.runner, workers.options)


def remove_results(folder: epath.Path) -> None:
    """To be called when a stage has written what its jobs made."""
    if (folder / UNITS).exists():
        (folder / UNITS).rmtree()


def run_here(
    jobs: Sequence[Any], shared: Any, processes: int | None, label: str, done: int = 0
) -> None:
    """Runs jobs, which have `size` and `run(shared)`, on this machine, with a progress bar on which
    `done` bytes were done before."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    with Progress(label, done + sum(job.size for job in jobs), "B", initial=done) as progress:
        for job in _finished(jobs, shared, processes):
            progress.update(job.size)


def _finished(jobs: Sequence[Any], shared: Any, processes: int) -> Iterator[Any]:
    if processes <= 1:
        for job in jobs:
            job.run(shared)
            yield job
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(shared,),
    ) as pool:
        running = {pool.submit(_run_in_worker, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                yield running[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?): to resume, run the same command"
                f" again, with fewer processes than {processes}"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker_shared: Any


def _start_worker(shared: Any) -> None:
    global _worker_shared
    _worker_shared = shared
    # A pool's workers outlive a parent that is killed; these must not go on writing.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(job: Any) -> None:
    job.run(_worker_shared)
