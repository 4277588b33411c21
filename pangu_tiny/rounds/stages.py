"""How a stage that is made of stages runs one of them."""

import inspect
from collections.abc import Callable
from typing import Any

from pangu_tiny import config, workdir
from pangu_tiny.topology.processes import say


def run(title: str, stage: Callable[..., Any], **given: Any) -> Any:
    """Runs a stage with what was bound for it, and leaves its effective config in its workdir."""
    if title:
        say(f"\n{title}")
    arguments, effective = config.arguments(stage, **given)
    with workdir.running(effective):
        return stage(**arguments)


def settings(stage: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """All parameters that `run` would run a stage with."""
    arguments, _ = config.arguments(stage, **given)
    call = inspect.signature(stage).bind(**arguments)
    call.apply_defaults()
    return call.arguments
