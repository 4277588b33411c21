"""The command line: one line and exit code 2 for a mistake, and an import without effects."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from pangu_tiny import cli
from pangu_tiny.errors import UserError

COMMAND = [sys.executable, "-m", "pangu_tiny"]


@contextlib.contextmanager
def port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def run(*argv, cwd=None):
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_module_is_the_command(tmp_path, monkeypatch):
    """A real process: a mistake that is found when all stages are read."""
    found = run(*COMMAND, "train", "--gin.train.stepz=3")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(
        "pangu-tiny train: --gin.train.stepz=3: train has no parameter 'stepz', expected one of "
    )
    assert found.stderr.count("\n") == 1


def test_a_mistake_inside_of_a_stage_is_one_line_too(tmp_path):
    found = run(*COMMAND, "generate", f"--gin.generate.checkpoint={tmp_path}")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == (
        f"pangu-tiny generate: checkpoint {tmp_path}: no checkpoint there, "
        "expected a train workdir or step\n"
    )


@pytest.fixture
def complaint(capfd):
    """Runs `main`; gives the one line that it leaves on standard error."""

    def run_main(*argv):
        try:
            code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
        out, err = capfd.readouterr()
        assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
        assert err.startswith("pangu-tiny")
        return err

    return run_main


JOIN = {"coordinator": "localhost:1234", "processes": "2", "process": "1"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"processes": None}, "--processes=HOW_MANY and --process=WHICH_ONE go together, found "),
        ({"process": None}, "go together, found localhost:1234, 2 and None"),
        ({"coordinator": None}, "go together, found None, 2 and 1"),
        ({"processes": "0"}, "--processes is 0, expected at least 1"),
        ({"process": "2"}, "--process is 2, expected at least 0 and at most 1"),
        ({"process": "-1"}, "--process is -1, expected at least 0"),
        ({"process": "one"}, "--process: invalid int value: 'one'"),
        ({"coordinator": "localhost"}, "--coordinator is 'localhost', expected HOST:PORT"),
        ({"coordinator": ":80"}, "--coordinator is ':80', expected HOST:PORT"),
        ({"coordinator": "localhost:http"}, "--coordinator is 'localhost:http', expected"),
        ({"coordinator": "localhost:65536"}, "--coordinator is 'localhost:65536', expected"),
        ({"distributed": True}, "--distributed finds all by itself, expected it without --coord"),
    ],
)
def test_flags_of_several_processes_are_named(complaint, changes, named):
    flags = JOIN | changes
    argv = [f"--{name}={value}" for name, value in flags.items() if isinstance(value, str)]
    argv += ["--distributed"] if "distributed" in changes else []
    assert named in complaint("train", *argv)


def test_a_port_in_use_is_named(complaint):
    """gRPC opens it beside the other process, or JAX ends with a stack trace."""
    with port_in_use() as port:
        flags = [f"--coordinator=localhost:{port}", "--processes=2", "--process=0"]
        assert f"process 0 cannot open port {port}: Address already in use" in complaint(
            "train", *flags
        )


def test_distributed_on_a_laptop_is_one_line():
    found = run(*COMMAND, "train", "--distributed")
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    assert "--distributed: JAX knows no cluster here" in found.stderr


def fail_with(monkeypatch, error):
    def generate():
        raise error

    monkeypatch.setattr(cli, "find_stage", lambda _: generate)


def test_what_a_library_raises_as_an_oserror_is_not_the_users(monkeypatch, complaint):
    """Such an error is a bare path or less; one of the system says what is wrong."""
    fail_with(monkeypatch, OSError(28, "No space left on device", "w/a.json"))
    assert "No space left on device: 'w/a.json'" in complaint("generate")
    fail_with(monkeypatch, FileNotFoundError("b/bucket/o/run1%2Frow_losses"))
    with pytest.raises(FileNotFoundError, match="row_losses"):
        cli.main(["generate"])


def test_debug_shows_where_it_went_wrong(monkeypatch):
    fail_with(monkeypatch, UserError("a mistake"))
    with pytest.raises(UserError, match="a mistake"):
        cli.main(["generate", "--debug"])


TRAIN = ("train", "--gin.train.dataset=d", "--gin.train.workdir=w", "--gin_file=hardware/cpu.gin")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "STAGE"),
        (("bake",), "invalid choice: 'bake'"),
        (("train", "--steps=3"), "unknown flag '--steps=3', expected --gin_file=F or --gin.NAME="),
        (("train", "--gin_fil=a.gin"), "unknown flag '--gin_fil=a.gin'"),
        (("train", "--gin.train.steps"), "unknown flag '--gin.train.steps'"),
        (("train", "steps"), "unknown flag 'steps'"),
        (("train", "--gin.teacher/train.steps=3"), "train reads no scope, expected train.steps"),
        (("train", "--gin_file"), "--gin_file: expected one argument"),
        (("train", "--gin_file=none.gin"), "--gin_file=none.gin: no such file"),
        (("train",), "train.dataset, train.workdir, ModelShape.depth, "),
        ((*TRAIN, "--gin.train.steps=many"), "train.steps = 'many': expected int"),
        ((*TRAIN, "--gin.trian.steps=3"), "unknown name 'trian', expected one of "),
        (
            (*TRAIN, "--gin_file=models/tiny_test.gin", "--gin.ModelShape.kv_heads=3"),
            "ModelShape.heads 4 is not divisible by ModelShape.kv_heads 3",
        ),
        (
            ("generate", "--gin.generate.checkpoint=none", "--gin.generate.top_p=1.5"),
            "generate.top_p is 1.5, expected more than 0 and at most 1",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(complaint, argv, named):
    assert named in complaint(*argv)


def stage_that(action):
    def generate(prompt: str = "") -> None:
        action(prompt)

    return generate


@pytest.fixture
def only_stage(monkeypatch):
    """Puts a function in the place of all stages."""
    return lambda action: monkeypatch.setattr(cli, "find_stage", lambda _: stage_that(action))


def test_errors_of_several_lines_and_full_disks_are_one_line(complaint, only_stage):
    def refuse(_):
        raise UserError("first\n  second")

    only_stage(refuse)
    assert complaint("generate") == "pangu-tiny generate: first second\n"

    def fill(_):
        raise OSError(28, "No space left on device", "runs/a")

    only_stage(fill)
    assert complaint("generate").endswith("No space left on device: 'runs/a'\n")


def test_exit_codes(only_stage):
    only_stage(lambda _: None)
    assert cli.main(["generate"]) == 0

    def interrupt(_):
        raise KeyboardInterrupt

    only_stage(interrupt)
    assert cli.main(["generate"]) == 130

    def fail(_):
        raise ValueError("a bug is not the user's: it keeps its stack trace")

    only_stage(fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["generate"])


def test_storage_that_does_not_answer_may_be_tried_again(only_stage, capsys):
    """One line, but not the exit code of a mistake, after which nothing starts the stage again."""

    def lose(_):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/data/d")

    only_stage(lose)
    assert cli.main(["generate"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_sigterm_ends_a_stage(only_stage, capsys):
    """In a container too, whose first process has no default for it. Nothing that a library catches
    stops it, and afterwards the signal is what it was."""
    before = signal.getsignal(signal.SIGTERM)

    def wait(_):
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    only_stage(wait)
    assert cli.main(["generate"]) == 143
    assert capsys.readouterr().err.endswith("stopped by SIGTERM; the same command resumes\n")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("text", ["Once upon a time", "-x", "a=b", "--gin.train.steps=3", "π"])
def test_text_reaches_a_stage_as_it_stands(only_stage, text):
    seen = []
    only_stage(seen.append)
    cli.main(["generate", f"--gin.generate.prompt={text}"])
    assert seen == [text]


def test_every_stage_is_a_function_of_the_same_name():
    for name in cli.STAGES:
        assert cli.find_stage(name).__name__ == name.replace("-", "_")


def test_help_lists_all_that_can_be_bound(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "  --gin.train.steps: int, must be given\n" in shown
    assert "  --gin.Hardware.tensor: int, default 1\n" in shown
    assert "steps: optimizer steps in all" in shown


PURE = """
import socket, sys
def refuse(*_): raise AssertionError("the network was touched")
socket.socket.connect = socket.getaddrinfo = refuse
import pangu_tiny, pangu_tiny.cli
heavy = {"jax", "tensorflow", "flax", "orbax", "grain", "tensorflow_datasets"} & sys.modules.keys()
assert not heavy, heavy
for stage in pangu_tiny.cli.STAGES:
    pangu_tiny.cli.find_stage(stage)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a stage started a device when imported"
assert "tensorflow" not in sys.modules
"""


def test_importing_touches_no_device_no_network_and_no_tensorflow():
    found = run(sys.executable, "-c", PURE)
    assert found.returncode == 0, found.stderr
