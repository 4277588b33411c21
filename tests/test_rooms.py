"""The plan of the rooms: imports run down the list, a stage lies in the file of its name."""

import ast
import inspect
import pathlib

import pytest

import pangu_tiny
from pangu_tiny.cli import STAGES, find_stage

PACKAGE = pathlib.Path(pangu_tiny.__file__).parent

ROOMS = [
    "__main__", "cli",
    "reproduce", "planning", "benchmark", "evaluation", "inherit", "rounds", "convert", "training",
    "checkpoints", "vocabulary", "program", "data", "model", "text", "tokenizer", "topology",
    "jobs", "beam", "config", "arrays", "page", "workdir", "progress", "git_lfs", "typed", "errors",
]  # fmt: skip
"""Packages and lone files; each imports those after it alone."""

FILES = {file.relative_to(PACKAGE): file.read_text() for file in PACKAGE.rglob("*.py")}
TREES = {place: ast.parse(text) for place, text in FILES.items()}
FUNCTIONS = {
    f"{place}:{node.name}": node
    for place, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
}
STAGE_FUNCTIONS = {f"{stage.room}/{n}.py:{n}" for n, stage in (
    (name.replace("-", "_"), stage) for name, stage in STAGES.items()
)}  # fmt: skip


def room_of(place: pathlib.Path) -> str:
    return place.parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The rooms of this project that a file imports, be it inside of a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {name[1] for name in parts if name[0] == "pangu_tiny" and len(name) > 1}


def upward(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows from a room to one that does not come after it."""
    return {
        (start, end)
        for start, end in arrows
        if start != end and ROOMS.index(start) >= ROOMS.index(end)
    }


def test_imports_run_down_the_list():
    """So that there is no cycle of rooms either."""
    arrows = {
        (room_of(place), end)
        for place, tree in TREES.items()
        if place.name != "__init__.py" or len(place.parts) > 1
        for end in imported(tree)
        if end != "__version__"
    }
    assert {start for start, _ in arrows} | {end for _, end in arrows} <= set(ROOMS)
    assert len(arrows) > 50 and upward(arrows) == set()
    assert upward({("text", "tokenizer"), ("topology", "model")}) == {("topology", "model")}


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("text", {"tokenizer", "model", "data"}),
        ("topology", {"model"}),
        ("model", {"data", "text", "tokenizer"}),
        ("program", {"text", "tokenizer", "workdir", "checkpoints"}),
        ("training", {"tokenizer", "text"}),
        ("data", {"model", "program", "topology"}),
    ],
)
def test_what_a_room_knows_nothing_of(room, unknown):
    found = [imported(tree) for place, tree in TREES.items() if room_of(place) == room]
    assert not unknown & set().union(*found)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_lies_in_the_file_of_its_name(name):
    stage = find_stage(name)
    function = name.replace("-", "_")
    assert stage.__name__ == function
    assert stage.__module__ == f"pangu_tiny.{STAGES[name].room}.{function}"


def test_files_and_functions_stay_small():
    """A file below 400 lines; 20 parameters for a stage, 12 for all else; 120 lines a function."""
    lines = {str(place): text.count("\n") for place, text in FILES.items()}
    assert {place: count for place, count in lines.items() if count >= 400} == {}
    parameters = {
        name: len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        for name, node in FUNCTIONS.items()
    }
    limits = {name: 20 if name in STAGE_FUNCTIONS else 12 for name in FUNCTIONS}
    assert {name: n for name, n in parameters.items() if n > limits[name]} == {}
    sizes = {name: node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS.items()}
    assert {name: size for name, size in sizes.items() if size > 120} == {}
    assert set(FUNCTIONS) > STAGE_FUNCTIONS and inspect.signature(find_stage("train"))
