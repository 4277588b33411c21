"""Every shipped gin file: it reads, what it binds has its type and builds its model, and what a
stage still needs is REQUIRED in it, so that its header can be relied upon."""

import re

import jax
import pytest

from pangu_tiny import config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.tables import SCOPES_AND_ROWS

ROOT = config.shipped_files()
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.gin"))
RUNNABLE = [file for file in FILES if file.startswith(("recipes/", "paper/"))]


def lines_of(file):
    """Those of a file and of all that it includes."""
    for line in (ROOT / file).read_text().splitlines():
        if included := re.match(r"include '(.*)'", line):
            yield from lines_of(included[1])
        else:
            yield line


def read(file):
    config.read(map(find_stage, STAGES), [file], [], SCOPES_AND_ROWS)


def test_there_are_files():
    assert len(FILES) > 30 and len(RUNNABLE) > 15


@pytest.mark.parametrize("file", FILES)
def test_a_file_reads_and_builds_its_models(file):
    read(file)
    lines = list(lines_of(file))
    scopes = {"", *(m[1] for line in lines if (m := re.match(r"(\w+)/ModelShape\.", line)))}
    bound = dict(line.split(" = ", 1) for line in lines if line.startswith("ModelShape."))
    if not bound or "%gin.REQUIRED" in bound.values():
        return

    def made(model: ModelShape) -> None: ...

    for scope in scopes:
        with config.within(scope):
            shape = config.arguments(made)[0]["model"]
        leaves = jax.tree.leaves(parameter_shapes(shape))
        padding = (shape.padded_vocab - shape.vocab_size) * shape.width * (2 - shape.tied)
        assert sum(leaf.size for leaf in leaves) == shape.parameters + padding


@pytest.mark.parametrize("file", RUNNABLE)
def test_what_a_stage_needs_is_required_in_the_file(file):
    """A recipe of reproduce gives its other stages what they need beside."""
    read(file)
    lines = list(lines_of(file))
    bound = {m[1] for line in lines if (m := re.match(r"(\w+)\.\w+ = ", line))}
    required = {m[1] for line in lines if (m := re.match(r"(\w+\.\w+) = %gin.REQUIRED", line))}
    stages = {name.replace("-", "_"): name for name in STAGES}
    runs = {"reproduce"} if "reproduce" in bound else bound & stages.keys()
    if "train_rounds" in runs and "train.dataset" not in required:
        runs -= {"train", "score_batches", "select_batches"}  # which it runs
    runs -= {"select_batches"}
    assert runs
    for stage in runs:
        with pytest.raises(UserError) as caught:
            config.arguments(find_stage(stages[stage]))
        missing = re.findall(r"[A-Za-z_]+\.[a-z_]+(?=,| must)", str(caught.value))
        hardware = [name for name in missing if name.startswith("Hardware.")]
        assert missing and not hardware and set(missing) <= required
