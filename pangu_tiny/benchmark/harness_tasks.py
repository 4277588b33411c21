"""Tasks of lm-evaluation-harness (lm-eval 0.4), and of the user's own files in its form.

What they read lies in a folder: `FOLDER/allenai/ai2_arc` is a copy of the repository of that name.
The network is left alone, unless HF_HUB_OFFLINE=0 says otherwise.
"""

import contextlib
import difflib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pangu_tiny.benchmark.examined import Examined
from pangu_tiny.benchmark.questions import LM_EVAL
from pangu_tiny.errors import UserError, failing_as

_SHARES = ("acc_norm", "acc", "exact_match")  # of which the first that a task has is its score
_REDRAWS = 100  # for the standard error of what is no mean


class HarnessTasks:
    """Tasks, groups and tags by name.

    Args:
      names: with their prefix.
      folder: where their data lies; paths in the user's files are seen from here.
      files: a folder with YAML files of the user's, or None.
      shots: of every task but those that say 0 themselves; None is what they say, or none.
      questions: of every task the first so many; None is all.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str,
        files: str | None,
        shots: int | None,
        questions: int | None,
    ):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            import datasets
            from lm_eval.tasks import TaskManager

            from pangu_tiny.benchmark import harness_model
        except ImportError as error:
            raise UserError(
                f"benchmark.tasks: {names[0]} needs lm-evaluation-harness:"
                f" pip install 'pangu_tiny[benchmark]' ({error})"
            ) from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        if "://" in folder:
            raise UserError(f"benchmark.folder is {folder}: tasks of lm-eval read a local folder")
        if files is not None and not os.path.isdir(files):
            raise UserError(f"benchmark.task_files is {files}, expected a folder of task files")
        self._model, self._questions = harness_model.HarnessModel, questions
        manager = TaskManager(include_path=files)
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        self._members: dict[str, list[str]] = {}
        for name in (name.removeprefix(LM_EVAL) for name in names):
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                expected = " or ".join(LM_EVAL + one for one in near) or "a name of its task list"
                raise UserError(f"benchmark.tasks: {LM_EVAL}{name} is unknown, expected {expected}")
            sought = (
                f"; looked for in {folder} and in Hugging Face's cache (HF_HUB_OFFLINE=0 fetches)"
            )
            wrong = f"benchmark.folder: {LM_EVAL}{name} could not be read"
            with failing_as(wrong, advice=sought), contextlib.chdir(folder), _as_lm_eval_runs():
                found = manager.load(name)
            for kind, of_kind in self._loaded.items():
                of_kind |= found[kind]
            self._members[name] = list(found["tasks"])
        for name, task in self._loaded["tasks"].items():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=1234)
            self._ask(name, task)

    def _ask(self, name: str, task: Any) -> None:
        """Makes a task's requests, once, so that its mistakes are told before anything is run."""
        if any(getattr(task, kind, False) for kind in ("UNSAFE_CODE", "MULTIMODAL")):
            raise UserError(f"benchmark.tasks: {LM_EVAL}{name} runs code or looks at pictures")
        wrong = f"benchmark.tasks: a row of {LM_EVAL}{name} cannot be asked"
        with failing_as(wrong), _as_lm_eval_runs():
            task.build_all_requests(limit=self._questions)
            for _, document in task.doc_iterator(limit=self._questions):
                task.doc_to_target(document)
        task.build_all_requests = lambda **_: None

    @property
    def facts(self) -> dict[str, Any]:
        """What tells these from others."""
        tasks = self._loaded["tasks"]
        return {name: task.get_config("num_fewshot") for name, task in sorted(tasks.items())}

    def check(self, longest: int) -> None:
        """Refuses what a model of so long sequences cannot be asked to write."""
        for name, task in self._loaded["tasks"].items():
            for request in task.instances:
                if request.request_type == "generate_until":
                    self._model.writing(request.args[1], longest, LM_EVAL + name)

    def scores(self, examined: Examined) -> dict[str, Any]:
        """By task and group its metrics, as lm-eval computes them of what a model answers."""
        from lm_eval.evaluator import evaluate

        os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork a process with threads
        with contextlib.redirect_stdout(io.StringIO()):
            found = evaluate(
                self._model(examined),
                self._loaded,
                limit=self._questions,
                bootstrap_iters=_REDRAWS,
                log_samples=False,
            )
        shares = {name: _share(metrics) for name, metrics in found["results"].items()}
        counted = {
            one
            for name, members in self._members.items()
            for one in ([name] if shares.get(name) else members)
        }
        return {
            LM_EVAL + name: {
                "metrics": {
                    metric: value
                    for metric, value in metrics.items()
                    if isinstance(value, int | float) and "," in metric
                },
                "shots": found["n-shot"].get(name),
                "questions": found["n-samples"].get(name, {}).get("effective"),
                "version": found["versions"].get(name),
                "metric": shares[name],
                "score": 100 * metrics[shares[name]] if shares[name] and name in counted else None,
            }
            for name, metrics in found["results"].items()
            if any("," in metric for metric in metrics)
        }


@contextlib.contextmanager
def _as_lm_eval_runs() -> Iterator[None]:
    """With the seeds that its own command sets before it loads and asks, since some tasks shuffle;
    and without its bars, of which there is one for every task."""
    random.seed(0)
    np.random.seed(1234)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _share(metrics: dict[str, Any]) -> str | None:
    """The name of the metric that is a share of right answers, of a task that has one."""
    return next(
        (name for share in _SHARES for name in metrics if name.split(",")[0] == share), None
    )
