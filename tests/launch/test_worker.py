"""launch/worker.sh, with stand-ins for what it changes on a worker."""

import shutil

import pytest
from stand_ins import REPOSITORY


@pytest.fixture
def worker(machine):
    machine.stand_in("sudo", "systemctl", "systemd-run", "gcsfuse", "mountpoint", "id")
    machine.real("tail", "touch")
    machine.when("id -u", "echo 7")
    machine.when("systemctl is-active *", "exit 3")
    machine.when("mountpoint *", "exit 1")
    machine.when("sudo *", '"${@}"')
    shutil.copy(REPOSITORY / "launch/worker.sh", machine.home)

    def run(*words):
        done = machine.run(str(machine.home / "worker.sh"), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    machine.worker = run
    return machine


def test_start_mounts_and_starts_a_unit(worker):
    worker.when("mkdir *", "")
    worker.worker("start", "my-bucket", str(worker.home / "data"), "300")
    called = [call for call in worker.calls if call[0] != "sudo"]
    assert ["gcsfuse", "-o", "ro", "--implicit-dirs", "my-bucket"] in [call[:5] for call in called]
    (unit,) = [call for call in called if call[0] == "systemd-run"]
    assert {"--unit=pangu-tiny", "--uid=7", "--property=TimeoutStopSec=300"} <= set(unit)
    assert unit[-2:] == ["bash", f"{worker.home}/stage.sh"]
    assert (worker.home / "log").exists()


def test_what_runs_is_not_started_twice(worker):
    worker.when("systemctl is-active *", "")
    worker.worker("start", "my-bucket", "/data", "300")
    assert worker.called() == ["systemctl is-active pangu-tiny"]


@pytest.mark.parametrize(
    ("state", "told"), [("running", "running"), ("exited", "0"), ("failed", "143"), ("dead", "255")]
)
def test_state(worker, state, told):
    worker.when("systemctl show *SubState*", f"echo {state}")
    worker.when("systemctl show *ExecMainStatus*", f"echo {'0' if state == 'exited' else 143}")
    assert worker.worker("state") == f"{told}\n"


def test_follow_goes_on_where_it_was(worker):
    (worker.home / "log").write_text("step 1\nstep 2\nstep 3\n")
    worker.when("systemctl show *MainPID*", "echo 0")
    assert worker.worker("follow", "2") == "2:step 2\n3:step 3\n"
    # A process that ends meanwhile: the log is shown to its end, and following ends with it.
    later = f"({shutil.which('sleep')} 0.2; echo step 4 >> {worker.home}/log) > /dev/null &"
    worker.when("systemctl show *MainPID*", f"{later}\necho $!")
    assert worker.worker("follow", "3") == "3:step 3\n4:step 4\n"
