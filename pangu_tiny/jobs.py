"""Jobs on a pool of processes, each of which leaves its result in a file of its own."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.progress import Progress
from pangu_tiny.tokenizer.model import Tokenizer


class Work(Protocol):
    """A share of the work."""

    @property
    def size(self) -> int:
        """Bytes of text, or of whatever the work grows with."""

    def run(self, tokenizer: Tokenizer) -> None: ...


class Job(Work, Protocol):
    """A share that writes the file `result`, last and atomically, so that a job whose result exists
    is done."""

    @property
    def result(self) -> epath.Path: ...


def run_jobs(jobs: Sequence[Job], tokenizer: Tokenizer, processes: int | None, label: str) -> None:
    """`run_all` of the jobs that have no result yet."""
    todo = [job for job in jobs if not job.result.exists()]
    done = sum(job.size for job in jobs) - sum(job.size for job in todo)
    run_all(todo, tokenizer, processes, label, done)


def run_all(
    jobs: Sequence[Work],
    tokenizer: Tokenizer,
    processes: int | None,
    label: str,
    done: int = 0,
) -> None:
    """Runs jobs, with a progress bar.

    Args:
      jobs: can be pickled.
      tokenizer: is given to every job.
      processes: worker processes; None takes all cores.
      label: what is being done.
      done: bytes that were done before.

    Raises:
      UserError: of a job, or a worker was killed; no worker goes on then.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    with Progress(label, done + sum(job.size for job in jobs), "B", initial=done) as progress:
        for job in _finished(jobs, tokenizer, processes):
            progress.update(job.size)


def _finished(jobs: Sequence[Work], tokenizer: Tokenizer, processes: int) -> Iterator[Work]:
    if processes <= 1:
        for job in jobs:
            job.run(tokenizer)
            yield job
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.model_bytes,),
    ) as pool:
        running = {pool.submit(_run_in_worker, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                yield running[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again to go on,"
                f" with fewer processes than {processes}"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker_tokenizer: Tokenizer


def _start_worker(model_bytes: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(model_bytes)
    # A pool's workers outlive a parent that is killed; these must not go on writing.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(job: Work) -> None:
    job.run(_worker_tokenizer)
