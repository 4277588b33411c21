"""launch/gke.sh against stand-ins: what it calls, what it applies, and what it leaves."""

import manifests
import pytest

OPTIONS = (
    "--project=p",
    "--location=us-west4",
    "--cluster=c",
    "--image=us-docker.pkg.dev/p/r/i:1",
    "--bucket=my-bucket",
)
STAGE = (
    "train",
    "--gin_file=recipes/pangu_pi_1b_pro.gin",
    "--gin_file=hardware/v5e_256.gin",
    "--gin.train.dataset=/data/d",
    "--gin.train.workdir=gs://my-bucket/pro",
)
START = (*OPTIONS, "start", "pro", *STAGE)
ODD = (
    "--gin.Hardware.topology=2 × v5e-256",
    "--gin.Hardware.data=32",
    '--gin.Hardware.compilation_cache=gs://b/it\'s "π" $(HOME) \\x: #',
)
STATE = "kubectl get jobset * --output=jsonpath={.status.terminalState}*"
PODS = "kubectl get pods *"
CHECKED = [
    "gcloud container clusters get-credentials c",
    "gcloud storage cp - gs://my-bucket/pro.probe",
    "gcloud storage rm gs://my-bucket/pro.probe",
    "kubectl get jobset pro",
    "kubectl apply",
]


@pytest.fixture
def gke(machine):
    """With a job that runs, is restarted once, and is done."""
    machine.when(STATE, "echo ' 0'", "echo ' 0'", "echo ' 1'", "echo 'Completed 1'")
    machine.when(
        PODS,
        "echo 'pro-0-a Pending'",
        "echo 'pro-0-a Running'",
        "printf 'x Failed\\npro-0-b Running\\n'",
    )
    machine.when("kubectl logs pro-0-a *", "echo step 1")
    machine.when("kubectl logs pro-0-b *", "echo step 2", "")
    return machine


def applied(machine):
    return manifests.read(machine.input.partition("\n")[2])


def test_starts_and_follows_over_a_restart(gke):
    done = gke.run("gke.sh", *START)
    assert done.returncode == 0, done.stderr
    assert gke.called()[:5] == CHECKED
    assert done.stdout == "step 1\nstep 2\n"
    assert done.stderr.startswith(
        "pro: for 1 × a node pool of 64 ct5lp-hightpu-4t, topology 16x16\n"
    )
    assert "pro-0-b: Running, restart 1\n" in done.stderr and "pro: done" in done.stderr
    logs = [call for call in gke.calls if call[1] == "logs"]
    assert [call[2] for call in logs] == ["pro-0-a", "pro-0-b", "pro-0-b"]
    assert not any(word.startswith("--since-time") for word in logs[0] + logs[1])
    assert any(word.startswith("--since-time=20") for word in logs[2])
    assert gke.is_clean()


def test_the_manifest_of_one_slice(gke):
    gke.run("gke.sh", "--reservation=r", "--queue=q", "--service-account=sa", "--grace=60", *START)
    job_set, config_map = applied(gke)
    assert config_map is None
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    (job,) = job_set["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 64 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 60 and pod["serviceAccountName"] == "sa"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/reservation-name": "r",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["pangu-tiny", *STAGE]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data", "readOnly": True}]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"


def test_several_slices_and_odd_words(gke):
    gke.run("gke.sh", "--spot", "--restarts=3", *START, *ODD)
    job_set, _ = applied(gke)
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 3
    (job,) = job_set["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    words = pod["containers"][0]["command"]
    assert [word.replace("$$", "$") for word in words] == ["pangu-tiny", *STAGE, *ODD]
    assert "$$(HOME)" in words[-1]  # or Kubernetes would put a variable there


def test_a_stage_without_tpu_and_own_gin_files(gke):
    (gke.home / "mine").mkdir()
    text = "count_tokens.dataset = '/data/größer'  # \"x\"\n"
    (gke.home / "mine/a.gin").write_text(text, encoding="utf-8")
    stage = ("count-tokens", "--gin_file=mine/a.gin", "--gin.count_tokens.workdir=gs://b/c")
    done = gke.run("gke.sh", "--cpu=4", "--memory=8Gi", *OPTIONS, "start", "pro", *stage)
    assert done.returncode == 0, done.stderr
    job_set, config_map = applied(gke)
    assert "annotations" not in job_set["metadata"]
    assert config_map["data"] == {"gin-0": text}
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "8Gi"}
    assert container["workingDir"] == "/gin" and "securityContext" not in container
    assert pod["volumes"][1]["configMap"]["items"] == [{"key": "gin-0", "path": "mine/a.gin"}]


def test_a_job_that_failed(gke):
    gke.when(STATE, "echo 'Failed 10'")
    gke.when("kubectl get jobset * --output=jsonpath={.status.cond*", "echo 'too many restarts'")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 1
    assert "pro failed after 10 restarts: too many restarts" in done.stderr
    assert "kubectl delete" not in " ".join(gke.called())


def test_refused_apply_leaves_nothing(gke):
    gke.when("kubectl apply *", "echo 'exceeded quota' >&2; exit 1")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 1 and "the cluster refused the job" in done.stderr
    assert gke.called() == [*CHECKED, "kubectl delete jobset/pro configmap/pro-gin"]
    assert gke.is_clean()


@pytest.mark.parametrize("before", ["gcloud storage cp *", "kubectl apply *"])
def test_interrupted_before_it_runs(gke, before):
    gke.when(before, "kill -INT 0; exit 1")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 130
    undone = "kubectl delete jobset/pro configmap/pro-gin" if "apply" in before else CHECKED[2]
    assert gke.called()[-1] == undone and gke.is_clean()


def test_interrupted_while_following(gke):
    gke.when("kubectl logs *", "echo step 1; kill -INT 0; exit 1")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 130
    assert "--project=p --location=us-west4 --cluster=c follow pro" in done.stderr
    assert gke.called()[-1] == "kubectl logs pro-0-a" and gke.is_clean()


def test_follow_and_delete(gke):
    done = gke.run("gke.sh", *OPTIONS[:3], "follow", "pro")
    assert done.returncode == 0 and done.stdout == "step 1\nstep 2\n"
    done = gke.run("gke.sh", *OPTIONS[:3], "delete", "pro")
    assert done.returncode == 0
    assert gke.called()[-2:] == [CHECKED[0], "kubectl delete jobset/pro configmap/pro-gin"]


def test_a_job_of_that_name(gke):
    gke.when("kubectl get jobset * --output=name", "echo jobset/pro")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 2 and "there is a job pro already" in done.stderr
    assert gke.called() == CHECKED[:4]


def test_a_bucket_that_cannot_be_written(gke):
    gke.when("gcloud storage cp *", "cat > /dev/null; echo '403' >&2; exit 1")
    done = gke.run("gke.sh", *START)
    assert done.returncode == 2 and "gs://my-bucket cannot be written" in done.stderr
    assert gke.called() == CHECKED[:2]


def test_a_cluster_that_stops_answering(gke):
    gke.when(STATE, "exit 1")
    done = gke.run("gke.sh", *OPTIONS[:3], "follow", "pro")
    assert done.returncode == 1 and "(5 tries)" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (START[1:], "no project: expected --project=…"),
        ((*OPTIONS[:3], *OPTIONS[4:], *START[5:]), "no image: expected --image=…"),
        (("--bucket=gs://my-bucket", *OPTIONS[:4], *START[5:]), "expected the name of a bucket"),
        (("--restarts=many", *START), "--restarts=many: expected a whole number"),
        (("--image=a b", *START), "--image=a b: expected letters"),
        (("--colour=red", *START), "unknown option --colour=red, expected --project=…"),
        ((*OPTIONS, "start", "Pro", *STAGE), "name 'Pro': expected"),
        ((*OPTIONS, "start", "pro"), "no stage: expected"),
        ((*OPTIONS, "stop", "pro"), "unknown command 'stop'"),
        (
            (*START, "--gin_file=hardware/gpu.gin", "--gin.Hardware.topology=None"),
            "needs a TPU slice",
        ),
    ],
)
def test_refused_in_one_line(machine, words, said):
    done = machine.run("gke.sh", *words)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and machine.calls == []


@pytest.mark.parametrize("tool", ["gcloud", "kubectl"])
def test_without_a_tool(machine, tool):
    machine.without(tool)
    done = machine.run("gke.sh", *START)
    assert done.returncode == 2 and done.stderr == f"gke.sh: {tool} is not installed\n"


def test_dry_run(machine):
    machine.without("gcloud")
    machine.without("kubectl")
    done = machine.run("gke.sh", "--dry-run", "--spot", *START, *ODD)
    assert done.returncode == 0 and machine.calls == [] and machine.is_clean()
    lines = done.stdout.splitlines()
    first = lines.index("apiVersion: jobset.x-k8s.io/v1alpha2")
    last = lines.index("                  mountOptions: implicit-dirs")
    job_set, _ = manifests.read("\n".join(lines[first : last + 1]))
    assert job_set["spec"]["replicatedJobs"][0]["replicas"] == 2
    tools = [" ".join(line.split()[:3]) for line in lines[:first] + lines[last + 1 :]]
    assert tools == [
        "gcloud container clusters",
        "gcloud storage cp",
        "gcloud storage rm",
        "kubectl get jobset",
        "kubectl apply --filename=-",
        "kubectl get jobset",
        "kubectl get pods",
        "kubectl logs pro-slice-0-0",
    ]


def test_build(machine):
    done = machine.run("gke.sh", OPTIONS[3], "build")
    assert done.returncode == 0, done.stderr
    assert [call[:2] for call in machine.calls] == [
        ["git", "clone"],
        ["docker", "build"],
        ["docker", "push"],
    ]
    machine.without("docker")
    done = machine.run("gke.sh", OPTIONS[3], "build")
    assert done.returncode == 2 and done.stderr == "gke.sh: docker is not installed\n"
