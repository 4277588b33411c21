"""launch/tpu_vm.sh against stand-ins: what it asks of Google Cloud, and what it leaves."""

import shlex
import subprocess

import pytest
from test_gke import ODD, STAGE

OPTIONS = ("--project=p", "--zone=us-west4-a", "--bucket=my-bucket")
START = (*OPTIONS, "start", "pro", *STAGE)
STATE = "gcloud * describe *state.state*"
QUEUED = "gcloud compute tpus queued-resources"
GET = [f"{QUEUED} create", f"{QUEUED} describe", f"{QUEUED} scp", "install all"]
RUN = ["start all", "follow first", "state first"]
DELETE = [f"{QUEUED} delete"]


@pytest.fixture
def tpu(machine):
    """With slices that come at the second look, and a stage that ends well."""
    machine.when("gcloud * describe *", "exit 1", "echo PROVISIONING", "echo ACTIVE")
    machine.when("gcloud * --command=*worker.sh follow*", "echo 1:step 1; echo 2:step 2")
    machine.when("gcloud * --command=*worker.sh state*", "echo 0")
    return machine


def called(machine):
    """Calls in short, from the first creation on; of the same ones in a row, one."""
    short = []
    for call in machine.calls:
        line = " ".join(call[:5])
        command = [word for word in call if word.startswith("--command=")]
        if command:
            where = "all" if "--worker=all" in call else "first"
            line = f"{command[0].split()[2] if ' ' in command[0] else command[0]} {where}"
        if call[0] != "sleep" and not (short and short[-1] == line):
            short.append(line)
    return short[next(i for i, line in enumerate(short) if "create" in line) :]


def words_of(machine, verb):
    return [call for call in machine.calls if call[4:5] == [verb]]


def test_from_nothing_to_done(tpu):
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    assert [call[:3] for call in tpu.calls[1:5]] == [
        ["git", "clone", "--quiet"],
        ["git", "-C", tpu.calls[1][-1]],
        ["gcloud", "storage", "cp"],
        ["gcloud", "storage", "rm"],
    ]
    assert called(tpu) == [*GET, *RUN, *DELETE]
    assert done.stdout == "step 1\nstep 2\n"
    assert "pro: PROVISIONING\npro: ACTIVE\n" in done.stderr
    (create,) = words_of(tpu, "create")
    assert create[5:] == [
        "pro",
        "--accelerator-type=v5litepod-256",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pro",
        "--async",
        "--zone=us-west4-a",
        "--project=p",
    ]
    (delete,) = words_of(tpu, "delete")
    assert "--force" in delete and "--quiet" in delete
    assert tpu.is_clean()


def test_options_several_slices_and_odd_words(tpu):
    kept = tpu.folder / "kept"
    tpu.when("gcloud * scp *", f'cp -r "$6" {kept}')
    (tpu.home / "mine.gin").write_text("train.workdir = 'gs://b/größer'\n", encoding="utf-8")
    options = ("--spot", "--service-account=a@p.iam", "--valid-until-duration=6h")
    words = (*STAGE, *ODD, "--gin_file=mine.gin")
    done = tpu.run("tpu_vm.sh", *options, *OPTIONS, "start", "pro", *words)
    assert done.returncode == 0, done.stderr
    (create,) = words_of(tpu, "create")
    assert create[8:13] == [
        "--spot",
        "--service-account=a@p.iam",
        "--valid-until-duration=6h",
        "--node-count=2",
        "--node-prefix=pro",
    ]
    assert (kept / "gin/mine.gin").read_text(encoding="utf-8").endswith("größer'\n")
    assert (kept / "worker.sh").exists()
    # What the shell of a worker makes of the command.
    shell = (kept / "stage.sh").read_text(encoding="utf-8")
    program, *given = shlex.split(shell.removeprefix("exec "))
    assert program == "~/pangu-tiny/.venv/bin/pangu-tiny" and given == list(words)
    shown = subprocess.run(
        ["bash", "-c", shell.replace(f"exec {program}", "printf '%s\\0'")], capture_output=True
    )
    assert shown.stdout.decode().split("\0")[:-1] == list(words)


def test_a_stage_for_the_first_worker(tpu):
    stage = ("count-tokens", "--gin.count_tokens.dataset=/data/d", "--gin.count_tokens.workdir=w")
    done = tpu.run("tpu_vm.sh", *OPTIONS, "start", "pro", *stage, "--gin_file=hardware/v5e_256.gin")
    assert done.returncode == 0, done.stderr
    assert [line.replace("first", "all") for line in called(tpu)] == [
        line.replace("first", "all") for line in (*GET, *RUN, *DELETE)
    ]
    assert not any("--worker=all" in call for call in tpu.calls)


def test_quota_refused(tpu):
    tpu.when("gcloud * create *", "echo 'Quota limit' >&2; exit 1")
    tpu.when(STATE, "exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 1
    assert "Quota limit\ntpu_vm.sh: 1 × v5litepod-256 was refused\n" in done.stderr
    assert called(tpu) == GET[:2] and tpu.is_clean()


def test_slices_whose_creation_was_answered_to_nobody_are_deleted(tpu):
    tpu.when("gcloud * create *", "exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 1 and called(tpu) == [*GET[:2], *DELETE]


def test_failed_slices_are_deleted(tpu):
    tpu.when(STATE, "exit 1", "echo FAILED")
    tpu.when("gcloud * describe *failedData*", "echo 'no capacity'")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 1 and "no slices: no capacity" in done.stderr
    assert called(tpu) == [*GET[:2], *DELETE]


def test_suspended_in_the_middle(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "exit 1", "echo 0")
    tpu.when(STATE, "exit 1", "echo ACTIVE", "echo SUSPENDED", "echo ACTIVE")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    assert called(tpu) == [*GET, *RUN, GET[1], *DELETE, *GET, *RUN, *DELETE]
    assert "the slices are lost: SUSPENDED\npro: attempt 2 of 10" in done.stderr


def test_a_crash_is_started_again_on_the_same_slices(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "echo 143", "echo running", "echo 0")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    # The second time, the connection was lost once.
    assert called(tpu) == [*GET, *RUN, "stop all", *RUN, *RUN[1:], *DELETE]
    follows = [word for call in tpu.calls for word in call if "worker.sh follow" in word]
    assert [word.split()[-1] for word in follows] == ["1", "3", "3"]
    assert done.stdout == "step 1\nstep 2\n", "what is sent again is not shown again"


def test_an_outage_here_is_none_of_the_slices(tpu):
    """The connection, and then Google Cloud itself, are not reached for a while."""
    tpu.when("gcloud * --command=*worker.sh state*", *["exit 1"] * 5, "echo 0")
    tpu.when(STATE, "exit 1", "echo ACTIVE", *["exit 1"] * 5, "echo ACTIVE")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Google Cloud does not answer; waiting for it, pro goes on") == 1
    assert len(words_of(tpu, "create")) == len(words_of(tpu, "delete")) == 1


def test_what_somebody_deleted_is_not_made_anew(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "exit 1")
    gone = "echo 'NOT_FOUND: Requested entity was not found' >&2; exit 1"
    tpu.when(STATE, gone, "echo ACTIVE", gone)
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 1 and "pro was deleted by somebody else" in done.stderr
    assert len(words_of(tpu, "create")) == 1 and words_of(tpu, "delete") == []
    done = tpu.run("tpu_vm.sh", *OPTIONS[:2], "follow", "no-such-job")
    assert "ended: deleted" in done.stderr, "follow does not wait for ever"


def test_a_mistake_is_not_tried_again(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "echo 2")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 2 and "a mistake to mend" in done.stderr
    assert called(tpu) == [*GET, *RUN, *DELETE]


def test_too_many_attempts(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "echo 1")
    done = tpu.run("tpu_vm.sh", "--attempts=2", *START)
    assert done.returncode == 1 and "did not come to its end in 2 attempts" in done.stderr
    assert called(tpu) == [*GET, *RUN, "stop all", *RUN, "stop all", *DELETE]


def test_a_worker_that_does_not_answer(tpu):
    tpu.when("gcloud * --command=*worker.sh install*", "exit 1", "exit 1", "exit 1", "")
    tpu.when("gcloud * --worker=5 * --command=true *", "exit 1")
    tpu.when("gcloud * --worker=5 --command=true *", "exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    assert "installing failed after 3 tries; slice/worker without an answer: 0/5" in done.stderr
    assert "pro: attempt 2 of 10" in done.stderr
    assert called(tpu) == [*GET, "--command=true first", *DELETE, *GET, *RUN, *DELETE]


def test_the_first_worker_falls_silent(tpu):
    tpu.when("gcloud * --command=*worker.sh state*", "exit 1", "exit 1", "exit 1", "echo 0")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 0, done.stderr
    assert "worker 0/0 does not answer (3 tries)" in done.stderr
    assert len(words_of(tpu, "create")) == len(words_of(tpu, "delete")) == 2


@pytest.mark.parametrize(
    "verb", ["create", "describe *state.state", "scp", "ssh *install", "ssh *start"]
)
def test_interrupted_before_it_runs(tpu, verb):
    tpu.when(f"gcloud * {verb}*", *["exit 1"] * verb.startswith("describe"), "kill -INT 0; exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 130
    assert called(tpu)[-1:] == DELETE and len(words_of(tpu, "delete")) == 1
    assert tpu.is_clean()


def test_interrupted_while_following(tpu):
    tpu.when("gcloud * --command=*worker.sh follow*", "echo 1:step 1; kill -INT 0; exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 130 and words_of(tpu, "delete") == []
    assert "--project=p --zone=us-west4-a follow pro" in done.stderr
    assert "--project=p --zone=us-west4-a delete pro" in done.stderr


def test_what_cannot_be_deleted_is_said(tpu):
    tpu.when("gcloud * delete *", "exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 1 and "what is left costs money until it is deleted" in done.stderr


def test_follow_and_delete(tpu):
    done = tpu.run("tpu_vm.sh", *OPTIONS[:2], "follow", "pro")
    assert done.returncode == 0 and done.stdout == "step 1\nstep 2\n" and "ended: 0" in done.stderr
    done = tpu.run("tpu_vm.sh", *OPTIONS[:2], "delete", "pro")
    assert done.returncode == 0 and len(words_of(tpu, "delete")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (START[1:], "no project: expected --project=…"),
        ((OPTIONS[0], *START[2:]), "no zone: expected --zone=…"),
        (("--attempts=x", *START), "--attempts=x: expected a whole number"),
        ((*OPTIONS, "begin", "pro"), "unknown command 'begin'"),
    ],
)
def test_refused_in_one_line(machine, words, said):
    done = machine.run("tpu_vm.sh", *words)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and machine.calls == []


def test_a_bucket_that_cannot_be_written(tpu):
    tpu.when("gcloud storage cp *", "exit 1")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 2 and "gs://my-bucket cannot be written" in done.stderr
    assert words_of(tpu, "create") == [] and tpu.is_clean()


def test_a_resource_of_that_name(tpu):
    tpu.when(STATE, "echo ACTIVE")
    done = tpu.run("tpu_vm.sh", *START)
    assert done.returncode == 2 and "there is a queued resource pro already" in done.stderr
    assert len(tpu.calls) == 1


def test_without_gcloud(machine):
    machine.without("gcloud")
    done = machine.run("tpu_vm.sh", *START)
    assert done.returncode == 2 and done.stderr == "tpu_vm.sh: gcloud is not installed\n"


def test_dry_run(machine):
    machine.without("gcloud")
    machine.without("git")
    done = machine.run("tpu_vm.sh", "--dry-run", *START, *ODD)
    assert done.returncode == 0, done.stderr
    assert machine.calls == [] and machine.is_clean()
    shown = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [words[4] for words in shown if words[0] == "gcloud" and words[1] == "compute"] == [
        "create",
        "describe",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ]
    assert "--node-count=2" in next(words for words in shown if "create" in words)
    assert ODD[0] in next(words for words in shown if words[0] == "exec")
