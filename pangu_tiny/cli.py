"""The front door: `pangu-tiny STAGE --gin_file=F [--gin.NAME=VALUE …]`. Nothing else knows argv."""

import argparse
import contextlib
import importlib
import inspect
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from pangu_tiny import config, workdir
from pangu_tiny.errors import Stopped, UserError, kind_of, one_line
from pangu_tiny.reproduce.tables import SCOPES_AND_ROWS


class Stage(NamedTuple):
    """A stage `x-y` is the function `x_y` in the file `ROOM/x_y.py`.

    Attributes:
      room: its package.
      purpose: what it does, in a line.
      devices: what it computes on: "all" that there are, of several processes too; "cpu", so that
        no accelerator is taken or waited for; None for stages without JAX.
    """

    room: str
    purpose: str
    devices: str | None = None


STAGES = {
    "count-tokens": Stage("vocabulary", "how often a tokenizer emits each id"),
    "compress-tokenizer": Stage("vocabulary", "a small tokenizer out of a big one"),
    "prepare-data": Stage("data", "text to rows of token ids"),
    "remap-dataset": Stage("vocabulary", "rows of token ids to those of a small tokenizer"),
    "import-hf": Stage("convert", "a big model from Hugging Face's layout to a checkpoint", "cpu"),
    "rank-teacher": Stage("inherit", "what matters in a big model", "all"),
    "inherit": Stage("inherit", "a small checkpoint cut out of a big one", "cpu"),
    "train": Stage("training", "rows of token ids to a checkpoint", "all"),
    "score-batches": Stage("rounds", "the loss of all that a round trained", "all"),
    "select-batches": Stage("rounds", "what the next round trains on, by these losses"),
    "train-rounds": Stage("rounds", "train, score, select, train, in one command", "all"),
    "evaluate": Stage("evaluation", "held-out loss of a checkpoint", "all"),
    "benchmark": Stage("benchmark", "the scores of a checkpoint on the paper's benchmarks", "all"),
    "generate": Stage("evaluation", "text from a checkpoint", "all"),
    "export-hf": Stage("convert", "a checkpoint to Hugging Face's layout", "cpu"),
    "export-gguf": Stage("convert", "a checkpoint of plain blocks to a GGUF file", "cpu"),
    "plan": Stage("planning", "what a program will do on a TPU slice", "cpu"),
    "compare-plans": Stage("planning", "two or more plans side by side"),
    "measure-speed": Stage("planning", "how fast models are on the devices at hand", "all"),
    "reproduce": Stage("reproduce", "a whole recipe, from text to a report", "all"),
}


def find_stage(name: str) -> Callable[..., Any]:
    function = name.replace("-", "_")
    return getattr(importlib.import_module(f"pangu_tiny.{STAGES[name].room}.{function}"), function)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one stage. Exit codes: 0 done, 2 the user can mend it (one line says how), 143 stopped
    by SIGTERM or ^C and saved, 130 stopped by ^C, 1 anything else, such as another process lost."""
    options, bindings = parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # libraries' warnings are not the user's
    try:
        stopped = _run(options, bindings)
    except KeyboardInterrupt as error:
        return _end(options, error, 130)
    except _Terminated as error:
        _say(options, error)
        return _end(options, error, Stopped.code)
    except (UserError, OSError) as error:
        if options.debug or not _is_users(error):
            _end(options, error, 1, trace=True)
            raise
        _say(options, error)
        told = error if isinstance(error, UserError) else kind_of(error)
        return _end(options, error, told.code)
    except Exception as error:
        _end(options, error, 1, trace=True)
        raise
    return Stopped.code if stopped else 0


def _run(options: argparse.Namespace, bindings: list[tuple[str, str]]) -> bool:
    """Runs the stage; whether a signal asked it to stop, and it saved and did."""
    devices = STAGES[options.stage].devices
    if devices == "all":
        _start_devices(options)
    elif devices == "cpu":
        import jax

        jax.config.update("jax_platforms", "cpu")
    likely_first = (options.stage, *STAGES)
    config.read(map(find_stage, likely_first), options.gin_file, bindings, SCOPES_AND_ROWS)
    stage = find_stage(options.stage)
    arguments, effective = config.arguments(stage)
    with _ending_by_sigterm(), workdir.running(effective):
        return getattr(stage(**arguments), "stopped", False)


class _Terminated(BaseException):
    """SIGTERM came where nothing but what is written already is to be kept."""


@contextlib.contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """JAX took the signal for itself, and the first process of a container has no default for it;
    where a stage saves on it, it takes it again."""

    def end(*_: Any) -> NoReturn:
        raise _Terminated("stopped by SIGTERM; the same command resumes")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(options: argparse.Namespace, error: BaseException) -> None:
    """Says why a stage ends, and in which process, if there are several."""
    where = ""
    if STAGES[options.stage].devices == "all":
        from pangu_tiny.topology import processes

        if processes.several() and not isinstance(error, processes.Refused):
            where = f"{processes.named()}: "
    print(f"pangu-tiny {options.stage}: {where}{one_line(error)}", file=sys.stderr, flush=True)


def _is_users(error: UserError | OSError) -> bool:
    """A full disk or a folder without permission is the user's, and has the system's number; what
    a library raises as an OSError of its own has none."""
    return isinstance(error, UserError) or error.errno is not None


def _end(options: argparse.Namespace, error: BaseException, code: int, trace: bool = False) -> int:
    """Tells the other processes of this run, if there are any, and does not come back then."""
    if STAGES[options.stage].devices == "all":
        from pangu_tiny.topology import ending

        ending.end(error, code, trace)
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


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags of a stage, and its bindings by name; exits where one is not known."""
    parser = _Parser(
        prog="pangu-tiny",
        description="The PanGu-π Pro recipe for tiny language models, stage by stage.",
        epilog="STAGE --help lists what can be bound. --gin.NAME.PARAMETER=VALUE binds one value "
        "and wins over the files; a value that is not a gin literal is taken as a string.",
    )
    stages = parser.add_subparsers(
        dest="stage", required=True, metavar="STAGE", parser_class=_StageParser
    )
    for name, (_, purpose, devices) in STAGES.items():
        stage = stages.add_parser(name, help=purpose)
        stage.add_argument(
            "--gin_file", action="append", default=[], help="a gin file; may be given again"
        )
        stage.add_argument(
            "--debug", action="store_true", help="the whole stack trace where something is wrong"
        )
        if devices == "all":
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
        if "/" in name and options.stage != "reproduce":
            parser.error(f"{flag}: {options.stage} reads no scope, expected {name.split('/')[-1]}")
        bindings.append((name, value))
    return options, bindings


def _start_devices(options: argparse.Namespace) -> None:
    """Settles what must be settled before JAX starts."""
    from pangu_tiny.topology import joining  # JAX, which prepare-data has no use for
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    joining.start(options.distributed, options.coordinator, options.processes, options.process)
