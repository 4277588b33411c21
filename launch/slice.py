"""What gke.sh and tpu_vm.sh have to know of a stage, as NAME=VALUE lines:

    python launch/slice.py STAGE --gin_file=F … [--gin.NAME=VALUE …]

The flags are checked as the stage itself will check them, before anything is paid for.
"""

import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

try:
    from pangu_tiny import config
    from pangu_tiny.cli import STAGES, find_stage, parse
    from pangu_tiny.errors import UserError, one_line
    from pangu_tiny.reproduce.rungs import SCOPES
    from pangu_tiny.topology.hardware import Hardware
    from pangu_tiny.topology.slices import Slice, parse_slice
except ImportError as missing:
    print(f"{sys.executable}: {missing}; expected pangu_tiny in it, or in PYTHON", file=sys.stderr)
    sys.exit(2)


class Names(NamedTuple):
    """What Google calls a generation.

    Attributes:
      label: of its nodes on GKE, cloud.google.com/gke-tpu-accelerator.
      machine: its machine types, before the number of chips.
      queued: its accelerator types of queued resources, before the number.
      runtime: the image of its TPU VMs.
    """

    label: str
    machine: str
    queued: str
    runtime: str


NAMES = {
    "v4": Names("tpu-v4-podslice", "ct4p-hightpu", "v4", "tpu-ubuntu2204-base"),
    "v5e": Names("tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Names("tpu-v5p-slice", "ct5p-hightpu", "v5p", "v2-alpha-tpuv5"),
    "v6e": Names("tpu-v6e-slice", "ct6e-standard", "v6e", "v2-alpha-tpuv6e"),
}
"""From Google's pages "Plan TPUs in GKE", "TPU software versions" and the one of each generation,
as of November 2026."""


def main(argv: Sequence[str]) -> int:
    try:
        lines = list(_describe(argv))
    except (UserError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 2
    sys.stdout.reconfigure(encoding="utf-8")
    print("\n".join(lines))
    return 0


def _describe(argv: Sequence[str]) -> Iterator[str]:
    if any("\n" in word for word in argv):
        raise UserError("a flag has a line break in it, expected one line each")
    options, bindings = parse(argv)
    config.read(map(find_stage, (options.stage, *STAGES)), options.gin_file, bindings, SCOPES)
    config.arguments(find_stage(options.stage))  # which refuses what the stage would refuse
    everywhere = STAGES[options.stage].devices == "all"
    yield f"workers={'all' if everywhere else 'first'}"
    yield f"command={shlex.join(['pangu-tiny', *argv])}"
    for word in ("pangu-tiny", *argv):
        # In a manifest $(NAME) is a variable, and $$ a $.
        yield f"word={json.dumps(word.replace('$', '$$'), ensure_ascii=False)}"
    for path in _own_files(options.gin_file):
        yield f"file={path}"
        text = pathlib.Path(path).read_text(encoding="utf-8")
        yield f"text={json.dumps(text, ensure_ascii=False)}"

    def placed(hardware: Hardware) -> None: ...

    topology = config.arguments(placed)[0]["hardware"].topology
    if topology is not None:
        yield from _name(parse_slice(topology))
    elif everywhere:
        raise UserError(
            f"{options.stage} needs a TPU slice, but no Hardware.topology is bound; expected a "
            "hardware file of a slice, such as --gin_file=hardware/v5e_256.gin"
        )


def _name(where: Slice) -> Iterator[str]:
    names, chips = NAMES[where.generation], math.prod(where.shape)
    # One host has 4 chips; where the torus is flat, up to 8 chips are one host of their own.
    each = chips if len(where.shape) == 2 and chips <= 8 else 4
    if where.generation == "v4" and chips > 2048:
        raise UserError(f"topology {where}: slices of v4 are sold up to 8x16x16 (v4-4096)")
    number = chips * (2 if where.chip.counts_cores else 1)
    yield f"topology={'x'.join(map(str, where.shape))}"
    yield f"slices={where.slices}"
    yield f"hosts={chips // each}"
    yield f"chips={each}"
    yield f"label={names.label}"
    yield f"machine={names.machine}-{each}t"
    yield f"accelerator={names.queued}-{number}"
    yield f"runtime={names.runtime}"


def _own_files(gin_files: Sequence[str]) -> list[str]:
    """The gin files, includes too, that are not shipped and so have to travel; they are found again
    by the same relative path."""
    own: list[str] = []
    left = list(gin_files)
    while left:
        path = pathlib.Path(left.pop())
        if not path.is_file() or path.resolve().is_relative_to(config.shipped_files().resolve()):
            continue
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"--gin_file={path}: expected a path below the current folder")
        if not re.fullmatch(r"[\w./ -]+", str(path)):
            raise UserError(f"--gin_file={path}: expected letters, digits and _ . / - in its name")
        if str(path) not in own:
            own.append(str(path))
            text = path.read_text(encoding="utf-8")
            left += re.findall(r"""^include\s+['"](.+)['"]""", text, re.MULTILINE)
    return own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
