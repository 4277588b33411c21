"""Text, and one ladder of it for all that only read."""

import opencompass_files
import pytest
from recipes import argv
from tiny_runs import prepare

from pangu_tiny import cli


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare(folder)
    text = folder / "text.jsonl"
    text.write_text(text.read_text().replace('{"text":', '{"body":'))
    return text


@pytest.fixture(scope="package")
def benchmarks(tmp_path_factory):
    return str(opencompass_files.write(tmp_path_factory.mktemp("benchmarks")))


@pytest.fixture(scope="package")
def changes(text, benchmarks):
    """What is bound for the ladder beside its folder."""
    return {
        "reproduce.text": {"one": str(text), "two": str(text)},
        "reproduce.seeds": [1],
        "reproduce.prompts": ["the <b>", "cat"],
        "reproduce.benchmarks": benchmarks,
        "benchmark.tasks": ["boolq", "c3"],
        "prepare_data.text_key": "body",
    }


@pytest.fixture(scope="package")
def ladder(changes, tmp_path_factory):
    """Of five rungs, in both protocols."""
    workdir = tmp_path_factory.mktemp("ladder")
    assert cli.main(argv("laptop", workdir, **changes)) == 0
    return workdir


@pytest.fixture
def again(ladder, changes):
    """The same command."""
    return argv("laptop", ladder, **changes)
