"""The front door: `pangu-tiny STAGE --gin_file=F [--gin.NAME=VALUE …]`. Nothing else knows argv."""

import argparse
import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pangu_tiny import config, workdir
from pangu_tiny.errors import UserError

STAGES = {
    "count-tokens": ("pangu_tiny.tokenizer.counting", "how often a tokenizer emits each id"),
    "compress-tokenizer": ("pangu_tiny.tokenizer.compress", "a small tokenizer out of a big one"),
    "prepare-data": ("pangu_tiny.data.prepare", "text to rows of token ids"),
    "remap-dataset": ("pangu_tiny.data.remap", "rows of token ids to those of a small tokenizer"),
    "import-hf": (
        "pangu_tiny.convert.huggingface",
        "a big model from Hugging Face's layout to a checkpoint",
    ),
    "rank-teacher": ("pangu_tiny.inherit.rank", "what matters in a big model"),
    "inherit": ("pangu_tiny.inherit.cut", "a small checkpoint cut out of a big one"),
    "train": ("pangu_tiny.training.loop", "rows of token ids to a checkpoint"),
    "score-batches": ("pangu_tiny.rounds.score", "the loss of all that a round trained"),
    "select-batches": (
        "pangu_tiny.rounds.select",
        "what the next round trains on, by these losses",
    ),
    "train-rounds": ("pangu_tiny.reproduce.rounds", "train, score, select, train, in one command"),
    "evaluate": ("pangu_tiny.evaluation.perplexity", "held-out loss of a checkpoint"),
    "generate": ("pangu_tiny.evaluation.generate", "text from a checkpoint"),
    "reproduce": ("pangu_tiny.reproduce.recipe", "a whole recipe, from text to a report"),
}
"""Stage → module with the function of the same name, and what the stage does."""

_NEEDS_DEVICES = (
    "rank-teacher",
    "train",
    "score-batches",
    "train-rounds",
    "evaluate",
    "generate",
    "reproduce",
)
_ON_CPU = ("import-hf", "inherit")  # which know arrays and shapes, and need no accelerator


def find_stage(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(STAGES[name][0]), name.replace("-", "_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one stage. Exit codes: 0 done, 2 the user can mend it (one line says how), 130 ^C."""
    options, bindings = _parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # libraries' warnings are not the user's
    try:
        _run(options, bindings)
    except KeyboardInterrupt as error:
        return _end(options, error, 130)
    except (UserError, OSError) as error:
        if options.debug or not _is_users(error):
            _end(options, error, 1, trace=True)
            raise
        print(f"pangu-tiny {options.stage}: {' '.join(str(error).split())}", file=sys.stderr)
        return _end(options, error, 2)
    except Exception as error:
        _end(options, error, 1, trace=True)
        raise
    return 0


def _run(options: argparse.Namespace, bindings: list[tuple[str, str]]) -> None:
    if options.stage in _NEEDS_DEVICES:
        _start_devices(options)
    elif options.stage in _ON_CPU:
        _keep_to_the_cpu()
    likely_first = (options.stage, *STAGES)
    config.read(map(find_stage, likely_first), options.gin_file, bindings)
    stage = find_stage(options.stage)
    arguments, effective = config.arguments(stage)
    with workdir.running(effective):
        stage(**arguments)


def _is_users(error: UserError | OSError) -> bool:
    """A full disk or a folder without permission is the user's, and has the system's number; what
    a library raises as an OSError of its own has none."""
    return isinstance(error, UserError) or error.errno is not None


def _end(options: argparse.Namespace, error: BaseException, code: int, trace: bool = False) -> int:
    """Tells the other processes of this run, if there are any, and does not come back then."""
    if options.stage in _NEEDS_DEVICES:
        from pangu_tiny.training import processes

        if trace and processes.several():
            traceback.print_exception(error)
        processes.end(error, code)
    return code


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and complains in one line."""

    def __init__(self, **settings: Any):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _StageParser(_Parser):
    """Its help tells what the stage does and all that can be bound for it."""

    def format_help(self) -> str:
        stage = find_stage(self.prog.split()[-1])
        bindings = "\n".join(f"  --gin.{line}" for line in config.describe(stage))
        return f"{super().format_help()}\n{inspect.getdoc(stage)}\n\nbindings:\n{bindings}\n"


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = _Parser(
        prog="pangu-tiny",
        description="The PanGu-π Pro recipe for tiny language models, stage by stage.",
        epilog="STAGE --help lists what can be bound. --gin.NAME.PARAMETER=VALUE binds one value "
        "and wins over the files; a value that is not a gin literal is taken as a string.",
    )
    stages = parser.add_subparsers(
        dest="stage", required=True, metavar="STAGE", parser_class=_StageParser
    )
    for name, (_, purpose) in STAGES.items():
        stage = stages.add_parser(name, help=purpose)
        stage.add_argument(
            "--gin_file", action="append", default=[], help="a gin file; may be given again"
        )
        stage.add_argument(
            "--debug", action="store_true", help="the whole stack trace where something is wrong"
        )
        if name in _NEEDS_DEVICES:
            stage.add_argument(
                "--distributed", action="store_true", help="several hosts, found by JAX itself"
            )
            stage.add_argument("--coordinator", help="HOST:PORT of process 0, where JAX cannot")
            stage.add_argument("--processes", type=int, help="how many, with --coordinator")
            stage.add_argument("--process", type=int, help="which one, with --coordinator, from 0")
    options, rest = parser.parse_known_args(argv)
    bindings = []
    for flag in rest:
        name, equals, value = flag.removeprefix("--gin.").partition("=")
        if not flag.startswith("--gin.") or not equals:
            parser.error(f"unknown flag {flag!r}, expected --gin_file=F or --gin.NAME=VALUE")
        bindings.append((name, value))
    return options, bindings


def _keep_to_the_cpu() -> None:
    """So that no accelerator is taken, nor waited for on other hosts."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _start_devices(options: argparse.Namespace) -> None:
    """Settles what must be settled before JAX starts."""
    from pangu_tiny.topology.host import keep_freed_memory
    from pangu_tiny.training import processes  # JAX, which prepare-data has no use for

    keep_freed_memory()
    processes.start(options.distributed, options.coordinator, options.processes, options.process)
