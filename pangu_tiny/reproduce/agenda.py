"""Stages in an order that is known before the first: how many, and how long they may take."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny.topology import processes
from pangu_tiny.topology.processes import say
from pangu_tiny.workdir import read_json, write_atomically


class Step(NamedTuple):
    """A stage that is to be run.

    Attributes:
      flops: of its training, by which its time is foreseen; 0 for what takes little.
    """

    title: str
    run: Callable[[], Any]
    flops: float = 0.0


def run_steps(steps: Sequence[Step], folder: epath.Path) -> float:
    """Runs them one after the other, and says before each which one it is and how long the rest
    will take, from the time of those before. What each took is kept in the folder, so that it is
    known after an interruption.

    Returns:
      Seconds that all took, those of earlier runs included.
    """
    file = folder / "seconds.json"
    took: dict[str, float] = read_json(file) if file.exists() else {}
    for number, step in enumerate(steps):
        say(f"\n[{number + 1}/{len(steps)}] {step.title}{_foreseen(steps[number:], steps, took)}")
        began = time.monotonic()
        step.run()
        took[step.title] = max(took.get(step.title, 0.0), time.monotonic() - began)
        with processes.alone() as leads:
            if leads:
                write_atomically(file, json.dumps(took, indent=1))
    return sum(took[step.title] for step in steps)


def _foreseen(left: Sequence[Step], steps: Sequence[Step], took: dict[str, float]) -> str:
    """The time that is left, by the speed of training so far; nothing where none was seen."""
    seen = [step for step in steps if step.flops and step.title in took]
    flops = sum(step.flops for step in left if step.title not in took)
    if not seen or not flops:
        return ""
    speed = sum(step.flops for step in seen) / sum(took[step.title] for step in seen)
    return f" (about {_shown(flops / speed)} left)"


def _shown(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
