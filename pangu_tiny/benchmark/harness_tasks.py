"""Tasks of lm-evaluation-harness (lm-eval 0.4), and of the user's own files in its form.

What they read lies in a folder: `FOLDER/allenai/ai2_arc` is a copy of the repository of that name.
The network is left alone, unless HF_HUB_OFFLINE=0 says otherwise.
"""

import contextlib
import difflib
import logging
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from pangu_tiny.benchmark.examined import Examined
from pangu_tiny.benchmark.questions import LM_EVAL
from pangu_tiny.errors import UserError, one_line

_SHARES = ("acc_norm", "acc", "exact_match")  # of which the first that a task has is its score


class HarnessTasks:
    """Tasks, groups and tags by name.

    Args:
      names: with their prefix.
      folder: where their data lies; paths in the user's files are seen from here.
      files: a folder with YAML files of the user's, or None.
      shots: of every task that does not say 0 itself; None is what it says.
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
        except ImportError as error:
            raise UserError(
                f"benchmark.tasks: {names[0]} needs lm-evaluation-harness:"
                " pip install 'pangu_tiny[benchmark]'"
            ) from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        self._questions = questions
        asked = [name.removeprefix(LM_EVAL) for name in names]
        manager = TaskManager(include_path=files, include_defaults=False)
        if not set(asked) <= set(manager.all_tasks):
            manager = TaskManager(include_path=files)
        for name in asked:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                expected = " or ".join(LM_EVAL + one for one in near) or "a name of its task list"
                raise UserError(f"benchmark.tasks: {LM_EVAL}{name} is unknown, expected {expected}")
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        self._names: list[str] = []
        for name in asked:
            found = _loaded(manager, name, folder)
            for kind, of_kind in self._loaded.items():
                of_kind |= found[kind]
            self._names += [name] if name in found["groups"] else found["tasks"]
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=1234)  # as lm-eval's own command does

    @property
    def facts(self) -> dict[str, Any]:
        """What tells these from others."""
        tasks = self._loaded["tasks"]
        return {name: task.get_config("num_fewshot") for name, task in sorted(tasks.items())}

    def scores(self, examined: Examined) -> dict[str, Any]:
        """By task and group its metrics, as lm-eval computes them of what a model answers.

        Raises:
          UserError: a row lacks what its task reads.
        """
        from jinja2.exceptions import UndefinedError
        from lm_eval.evaluator import evaluate

        from pangu_tiny.benchmark.harness_model import HarnessModel

        random.seed(0)
        np.random.seed(1234)
        try:
            found = evaluate(
                HarnessModel(examined),
                self._loaded,
                limit=self._questions,
                bootstrap_iters=100,
                log_samples=False,
            )
        except UndefinedError as error:
            asked = ", ".join(LM_EVAL + name for name in self.facts)
            raise UserError(f"a row of {asked} cannot be asked: {one_line(error)}") from error
        shares = {name: _share(metrics) for name, metrics in found["results"].items()}
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
                "score": 100 * metrics[shares[name]]
                if shares[name] and name in self._names
                else None,
            }
            for name, metrics in found["results"].items()
        }


def _loaded(manager: Any, name: str, folder: str) -> Any:
    """A task, a group or what has a tag, with its data."""
    try:
        with contextlib.chdir(folder):
            return manager.load(name)
    except Exception as error:  # of datasets, its files, and lm-eval, of no common kind
        raise UserError(
            f"benchmark.folder: {LM_EVAL}{name} could not be read: {one_line(error)}; looked for in"
            f" {folder} and in Hugging Face's cache (HF_HUB_OFFLINE=0 fetches it)"
        ) from error


def _share(metrics: dict[str, Any]) -> str | None:
    """The name of the metric that is a share of right answers, of a task that has one."""
    return next(
        (name for share in _SHARES for name in metrics if name.split(",")[0] == share), None
    )
