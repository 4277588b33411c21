"""Steps in their order, how many there are, and what time is foreseen."""

import json

import pytest
from etils import epath

from pangu_tiny.reproduce import agenda
from pangu_tiny.reproduce.agenda import Step, run_steps


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by only where a step says so."""
    now = [0.0]
    monkeypatch.setattr(agenda.time, "monotonic", lambda: now[0])
    return now


def test_the_rest_is_foreseen_by_what_training_took(clock, tmp_path, capsys):
    def taking(seconds):
        def run():
            clock[0] += seconds

        return run

    steps = [
        Step("text", taking(1000)),
        Step("a", taking(300), 10.0),
        Step("b", taking(600), 20.0),
        Step("samples", taking(5)),
        Step("c", taking(30), 1.0),
    ]
    assert run_steps(steps, epath.Path(tmp_path)) == 1935
    titles = [line for line in capsys.readouterr().out.splitlines() if line]
    assert titles == [
        "[1/5] text",
        "[2/5] a",
        "[3/5] b (about 10 min left)",
        "[4/5] samples (about a minute left)",
        "[5/5] c (about a minute left)",
    ]


def test_after_an_interruption_what_was_taken_before_is_known(clock, tmp_path, capsys):
    """A step that is done already takes no time, and is not foreseen either."""

    def fail():
        raise KeyboardInterrupt

    def long():
        clock[0] += 7200

    with pytest.raises(KeyboardInterrupt):
        run_steps([Step("a", long, 1.0), Step("b", fail, 3.0)], epath.Path(tmp_path))
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"a": 7200}
    capsys.readouterr()
    steps = [Step("a", lambda: None, 1.0), Step("b", long, 3.0)]
    assert run_steps(steps, epath.Path(tmp_path)) == 14400
    out = capsys.readouterr().out
    assert "[1/2] a (about 6.0 h left)" in out and "[2/2] b (about 6.0 h left)" in out
