"""The stage `measure-speed`: how fast models decode, read, score and train on the devices at hand.

Decoding follows the paper's protocol: 20 sequences, 2 tokens of prompt, 510 that follow. The folder
that it writes holds

    speed.json      seconds of every run, compile time, memory; written after each program
    report.html     the table; written last
"""

import dataclasses
import json
import os
import statistics
from typing import Any

import jax

from pangu_tiny import config
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.page import Report, paragraph, section, table
from pangu_tiny.planning.timed import PROGRAMS, Sizes, Speed, measured, ready
from pangu_tiny.program.build import DTYPES
from pangu_tiny.progress import Progress
from pangu_tiny.rounds.stages import settings
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, first, from_first, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.training.metrics import peak_flops
from pangu_tiny.training.train import train
from pangu_tiny.workdir import environment, read_json, write_atomically

SPEED = "speed.json"
_STEPS = 1000  # of a run, where none are bound: no step depends on it
_PAPER = (
    "The paper's model of about 20 layers and 1B parameters decodes 29.49 tokens a second by the"
    " same protocol on one NVIDIA V100 in float16; whether that is one sequence or all of them is"
    " not stated."
)


def measure_speed(
    workdir: str,
    hardware: Hardware,
    model: ModelShape | None = None,
    models: list[str] | None = None,
    programs: list[str] | None = None,
    batch_size: int = 20,
    prompt_tokens: int = 2,
    new_tokens: int = 510,
    sequence_length: int = 2048,
    rounds: int = 5,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measures programs of one model or of several, each compiled first and then run some times.

    A step of train is what is bound for that stage: its dtype, its optimizer, its global batch, or,
    where none is bound, as many sequences as the devices take at once.

    Args:
      workdir: the folder to write.
      hardware: how the work is laid out.
      model: the shape to measure.
      models: gin files of shapes, measured one after the other, instead.
      programs: of "decode" (what follows prompts), "prefill" (prompts, read up to the first token
        that follows), "score" (a step of score-batches), "train" (a step of train); None is all
        but "score".
      batch_size: sequences that are continued or read at once.
      prompt_tokens, new_tokens: of what is decoded; 20 × (2 + 510) is the paper's protocol.
      sequence_length: of prompts that are read, and of rows; 2,048 in the paper.
      rounds: how often each is run after the first time.
      dtype: "float32" or "bfloat16" of matrices and activations; None is that of train.

    Returns:
      what speed.json holds.
    """
    programs = ["decode", "prefill", "train"] if programs is None else programs
    _check(batch_size, prompt_tokens, new_tokens, sequence_length, rounds, programs)
    shapes = _shapes(model, models)
    hardware = dataclasses.replace(hardware, compilation_cache=None)  # compiling is measured too
    sizes = Sizes(batch_size, prompt_tokens, new_tokens, sequence_length)
    bound = {name: _settings(shape, hardware, dtype) for name, shape in shapes.items()}
    check_one_of("measure_speed.dtype", next(iter(bound.values()))["dtype"], DTYPES)
    facts = {
        "models": {name: vars(shape) for name, shape in shapes.items()},
        "sizes": sizes._asdict(),
        "train": {name: _train_facts(one) for name, one in bound.items()},
        "hardware": vars(hardware),
        "rounds": rounds,
        "devices": _devices(),
    }
    where = claim_together(workdir, "measure-speed", facts)
    file = where / SPEED
    known = from_first(lambda: read_json(file, "speeds") if file.exists() else {})
    found = known or {**facts, "environment": environment(), "speeds": {}}
    for name, shape in shapes.items():
        for program in programs:
            key = f"{name}, {program}"
            if key not in found["speeds"]:
                speed = _measure(key, program, shape, bound[name], sizes, rounds)
                found["speeds"][key] = _told(speed, program, name, shape)
                with alone() as leads:
                    if leads:
                        write_atomically(file, json.dumps(found, indent=1))
    report = _report(found)
    with alone() as leads:
        if leads:
            report.write(where)
    say(f"measure-speed {file}: {found['devices']}")
    say(report.text())
    say(f"  report       {where / 'report.html'}")
    return found


def _check(
    batch: int, prompt: int, new: int, length: int, rounds: int, programs: list[str]
) -> None:
    check_number("measure_speed.batch_size", batch, 1)
    check_number("measure_speed.prompt_tokens", prompt, 1)
    check_number("measure_speed.new_tokens", new, 2)
    check_number("measure_speed.sequence_length", length, 2)
    check_number("measure_speed.rounds", rounds, 1)
    for program in programs:
        check_one_of("measure_speed.programs", program, PROGRAMS)
    if not programs or len(set(programs)) < len(programs):
        raise UserError(f"measure_speed.programs is {programs}, expected some, each of them once")


def _shapes(model: ModelShape | None, models: list[str] | None) -> dict[str, ModelShape]:
    """By the name that each has in the table."""
    if (model is None) == (models is None):
        raise UserError(
            "measure_speed.model or measure_speed.models is to be given, and not both: expected"
            " bindings of ModelShape, or a list of gin files with such"
        )
    if models is None:
        return {f"{model.depth} × {model.width:,}": model}
    if not models or len({*models}) < len(models):
        raise UserError(f"measure_speed.models is {models}, expected different gin files of shapes")
    return {file: config.build(ModelShape, file) for file in models}


def _settings(shape: ModelShape, hardware: Hardware, dtype: str | None) -> dict[str, Any]:
    """Of the stage train as they are bound, with or without a batch and a number of steps."""
    given: dict[str, Any] = {"dataset": "", "workdir": "", "model": shape, "hardware": hardware}
    for name, value in (("steps", _STEPS), ("global_batch", None)):
        if not config.is_bound(f"train.{name}"):
            given[name] = value
    bound = settings(train, **given)
    return {**bound, "dtype": dtype or bound["dtype"]}


def _train_facts(bound: dict[str, Any]) -> dict[str, Any]:
    names = ("dtype", "global_batch", "z_loss")
    return {name: bound[name] for name in names} | {"optimizer": vars(bound["optimizer"])}


_AT_ONCE = "Hardware.per_device_batch"


def _measure(
    key: str, program: str, shape: ModelShape, bound: dict[str, Any], sizes: Sizes, rounds: int
) -> Speed:
    with Progress(key, rounds + 1, "run", shown=first()) as progress:
        try:
            return measured(ready(program, shape, bound, sizes), rounds, lambda: progress.update(1))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            taken = "measure_speed.batch_size" if program in ("decode", "prefill") else _AT_ONCE
            raise UserError(
                f"{key} does not fit on the devices, expected a smaller {taken}"
            ) from error


def _devices() -> str:
    """How many of which kind; of CPUs how many cores."""
    kind = jax.devices()[0].device_kind
    cores = f" with {os.cpu_count()} cores" if kind == "cpu" else ""
    return f"{jax.device_count()} × {kind}{cores}"


def _told(speed: Speed, program: str, name: str, shape: ModelShape) -> dict[str, Any]:
    peak = peak_flops()
    slowest, fastest = speed.spread
    return {
        "model": name,
        "depth": shape.depth,
        "width": shape.width,
        "parameters": shape.parameters,
        "program": program,
        "tokens_per_second": speed.tokens_per_second,
        "slowest": slowest,
        "fastest": fastest,
        "mfu": peak and speed.flops / statistics.median(speed.seconds) / peak,
        "compile_seconds": speed.compile_seconds,
        "bytes": speed.bytes,
        "seconds": speed.seconds,
        "sequences": speed.sequences,
        "tokens": speed.tokens,
        "flops": speed.flops,
    }


_HEAD = (
    "model",
    "depth × width",
    "parameters",
    "program",
    "sequences",
    "tokens/s",
    "slowest to fastest run",
    "MFU",
    "compiled in",
    "memory of a device, by the compiler",
)


def _report(found: dict[str, Any]) -> Report:
    rows, facts = [], {}
    for key, one in found["speeds"].items():
        spread = f"{_figures(one['slowest'])} to {_figures(one['fastest'])}"
        mfu = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
        compiled, memory = f"{one['compile_seconds']:.1f} s", f"{one['bytes'] / 2**30:.2f} GiB"
        speed = _figures(one["tokens_per_second"])
        rows.append(
            (
                one["model"],
                f"{one['depth']} × {one['width']:,}",
                f"{one['parameters'] / 1e6:,.1f}M",
                one["program"],
                f"{one['sequences']:,}",
                speed,
                spread,
                mfu,
                compiled,
                memory,
            )
        )
        extra = f", MFU {mfu}" if mfu else ""
        facts[key] = f"{speed} tokens/s ({spread}){extra}, compiled in {compiled}, {memory}"
    sizes = found["sizes"]
    asked = (
        f"Decoding: {sizes['batch']} sequences, {sizes['prompt']} tokens of prompt, {sizes['new']}"
        f" that follow, which are counted. The others: {sizes['length']:,} tokens a sequence."
        f" Medians of {found['rounds']} runs on {found['devices']}; tokens are those of all"
        " sequences together."
    )
    sections = [section("Speed", table(rows, _HEAD), paragraph(asked), paragraph(_PAPER))]
    dtypes = {one["dtype"] for one in found["train"].values()}
    facts["dtype"] = ", ".join(sorted(dtypes))
    return Report("Speed", facts, (), sections)


def _figures(speed: float) -> str:
    """Whole where that is enough."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.2f}"
