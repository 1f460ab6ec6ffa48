"""`postrain launch`: scripts that bash and Kubernetes read, filled in, that start again what can go on."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from postrain import cli
from postrain.cluster import launch
from postrain.cluster.authentication import SECRET, read_secret
from postrain.cluster.discover import find_cluster
from postrain.cluster.launch import Job, fill
from postrain.errors import UserError

AGAIN = [124, 134, 137, 139, 143]  # a hang, SIGABRT, SIGKILL, SIGSEGV, SIGTERM or another process was lost
WORDS = ["train", "--config=c.py", "--workdir=/mnt/runs/My run", "--config.data.default_system=it's $(x) @HOSTS@"]


def make_job(target, **options):
    return Job(target, WORDS, "/mnt/runs/My run", **options)


def split_command(text, head):
    """The words of the command of a script that begins with ``head``."""
    [line] = [line.strip() for line in text.splitlines() if line.strip().startswith(head)]
    return shlex.split(line.removesuffix("&"))


def test_slurm_gets_a_script(tmp_path):
    text, command = fill(make_job("slurm:16", gpus=4))
    assert command == ["sbatch"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for line in ("--nodes=16", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --job-name=postrain-my-run-" in text
    # sbatch reads its lines as a shell does, and %% as %.
    [output] = [line for line in text.splitlines() if "--output" in line]
    assert shlex.split(output) == ["#SBATCH", "--output=/mnt/runs/My run/logs/slurm-%j.out"]
    odd, _ = fill(Job("slurm:2", WORDS, "/runs/50% of it's #2"))
    [output] = [line for line in odd.splitlines() if "--output" in line]
    assert shlex.split(output) == ["#SBATCH", "--output=/runs/50%% of it's #2/logs/slurm-%j.out"]
    with pytest.raises(UserError, match="sbatch takes no backslash or line break there"):
        fill(Job("slurm:2", WORDS, "/runs/a\\b"))
    words = split_command(text, "srun")
    assert words[3:] == [sys.executable, "-m", "postrain.cli", *WORDS]


@pytest.mark.parametrize(
    ("code", "cancelled", "requeued"),
    [(code, False, False) for code in (0, 1, 2, 130)] + [(code, False, True) for code in AGAIN] + [(143, True, False)],
)
def test_slurm_starts_again_what_can_go_on(tmp_path, code, cancelled, requeued):
    """The real script, with commands in place of SLURM's that write down what they get."""
    text, _ = fill(make_job("slurm:2"))
    ending = f"kill -TERM $PPID; sleep 0.3; exit {code}" if cancelled else f"exit {code}"
    for name, body in (("srun", ending), ("scontrol", f'echo "$@" > {tmp_path}/scontrol.out')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    (tmp_path / "job.sh").write_text(text)
    assert subprocess.run(["bash", tmp_path / "job.sh"], env=environment, timeout=30).returncode == code
    assert (tmp_path / "scontrol.out").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.out").read_text() == "requeue 4711\n"


def test_slurm_jobs_make_a_secret_of_their_own(tmp_path):
    """A new one at every start, by the environment: not in the script, nor on a command line that `ps` shows."""
    text, _ = fill(make_job("slurm:2"))
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$0.words"\nprintenv POSTRAIN_SECRET >> "$0.secrets"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    for _ in range(2):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        assert subprocess.run(["bash"], input=text, text=True, env=environment, timeout=30).returncode == 0
    one, other = (tmp_path / "srun.secrets").read_text().splitlines()
    assert re.fullmatch("[0-9a-f]{64}", one) and re.fullmatch("[0-9a-f]{64}", other) and one != other
    words = (tmp_path / "srun.words").read_text()
    assert other not in words and "--export=ALL" in words.splitlines()


def test_kubernetes_gets_a_job_set():
    text, command = fill(make_job("k8s:4", gpus=2, image="registry/postrain:1", volume="disk:/mnt"))
    assert command == ["kubectl", "apply", "-f", "-"]
    secret, job_set = yaml.safe_load_all(text)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    assert (
        name == spec["network"]["subdomain"]
        and name.startswith("postrain-my-run-")
        and spec["network"]["enableDNSHostnames"]
    )
    [workers] = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    # What may go on uses up the job's attempts, which starts the whole set again; any other code ends it.
    rules = {rule["action"]: rule["onJobFailureReasons"] for rule in spec["failurePolicy"]["rules"]}
    assert rules == {"FailJobSet": ["PodFailurePolicy"], "RestartJobSet": ["BackoffLimitExceeded"]}
    lost, failed = job["podFailurePolicy"]["rules"]
    assert (lost["action"], lost["onPodConditions"]) == ("Count", [{"type": "DisruptionTarget"}])
    assert (failed["action"], failed["onExitCodes"]["operator"], failed["onExitCodes"]["values"]) == (
        "FailJob",
        "NotIn",
        AGAIN,
    )
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never" and container["name"] == failed["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2} and container["image"] == "registry/postrain:1"
    assert container["command"] == ["python", "-m", "postrain.cli", *WORDS[:-1], WORDS[-1].replace("$(", "$$(")]
    assert {"name": "shared", "mountPath": "/mnt"} in container["volumeMounts"]
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}} in pod["volumes"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    [reference] = [entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if entry["name"] == SECRET]
    assert (secret["kind"], secret["metadata"]["name"], reference) == ("Secret", name, {"name": name, "key": "secret"})
    assert read_secret(4, {SECRET: secret["stringData"]["secret"]}) not in json.dumps(job_set)
    assert (
        secret["stringData"]
        != next(yaml.safe_load_all(fill(make_job("k8s:4", image="i", volume="c:/mnt"))[0]))["stringData"]
    )
    environment = {name: value for name, value in values.items() if value} | {"JOB_COMPLETION_INDEX": "3"}
    found = find_cluster(environment=environment)
    assert (found.coordinator, found.num_processes, found.process_id) == (f"{name}-workers-0-0.{name}:8476", 4, 3)
    assert [port["containerPort"] for port in container["ports"]] == [8476, found.channel_address[1]]


def read_name(job):
    return list(yaml.safe_load_all(fill(job)[0]))[1]["metadata"]["name"]


def test_runs_of_one_name_are_jobs_of_their_own():
    """`kubectl apply` of a second one would change the first, or do nothing."""
    places = ["a/run1", "b/run1", f"a/{'x' * 60}1", f"a/{'x' * 60}2", "a/--Läufe--", "a/___"]
    jobs = [Job("k8s:2", WORDS, f"/mnt/{place}", image="i", volume="c:/mnt") for place in places]
    jobs.append(dataclasses.replace(jobs[0], volume="d:/mnt"))
    names = [read_name(job) for job in jobs]
    assert len(set(names)) == len(jobs) and names[0].startswith("postrain-run1-")
    for name in names:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40
    again = dataclasses.replace(jobs[0], workdir=f"{jobs[0].workdir}/")
    assert read_name(again) == names[0]


def test_a_tpu_pod_gets_the_command_on_every_machine(tmp_path):
    """gcloud runs its --command on each machine; here a script of that name does."""
    text, command = fill(make_job("tpu-pod:my-slice"))
    assert command == ["bash"]
    assert split_command(text, "python3") == ["python3", "-m", "postrain.cli", *WORDS]
    (tmp_path / "gcloud").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$0.$4"\nlast="${@: -1}"\n'
        '[ "$4" = scp ] && exec cp "$5" "$HOME/${6#my-slice:}"\nexec bash -c "${last#--command=}"\n'
    )
    (tmp_path / "python3").write_text(
        '#!/bin/bash\nprintenv POSTRAIN_SECRET >> "$0.secrets"\nprintf "%s\\n" "$@" >> "$0.out"\n'
        '[ "$(grep -c postrain "$0.out")" -lt 6 ] || exit 2\n'
        f'codes=({" ".join(map(str, AGAIN))})\nexit "${{codes[$(grep -c postrain "$0.out") - 1]}}"\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("gcloud", "python3", "sleep"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    folders = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | folders
    assert subprocess.run(command, input=text, text=True, env=environment, timeout=30).returncode == 2
    ssh, scp = ((tmp_path / f"gcloud.{name}").read_text() for name in ("ssh", "scp"))
    assert ssh.splitlines()[:6] == ["compute", "tpus", "tpu-vm", "ssh", "my-slice", "--worker=all"]
    assert scp.splitlines()[3:4] + scp.splitlines()[5:] == ["scp", "my-slice:.postrain-secret", "--worker=all"]
    # One secret for all starts and machines, by a file that is deleted: `ps` shows it to nobody.
    [secret] = set((tmp_path / "python3.secrets").read_text().splitlines())
    assert re.fullmatch("[0-9a-f]{64}", secret) and secret not in text + ssh + scp
    assert list((tmp_path / "home").iterdir()) == []
    assert (tmp_path / "python3.out").read_text().splitlines() == ["-m", "postrain.cli", *WORDS] * 6
    # A run that is stopped each time, by a machine that is broken, is not started for ever.
    (tmp_path / "python3").write_text('#!/bin/bash\necho >> "$0.starts"\nexit 124\n')
    assert subprocess.run(command, input=text, text=True, env=environment, timeout=30).returncode == 124
    assert len((tmp_path / "python3.starts").read_text()) == 101


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    values = {"model": {"path": str(tmp_path / "model")}, "data": {"train": str(tmp_path / "rows.jsonl")}}
    path = tmp_path / "c.py"
    path.write_text(f"def get_config(arg=None):\n    return {json.loads(json.dumps(values))!r}\n")
    return path


def test_dry_runs_print_all_and_start_nothing(config, tmp_path, capsys):
    words = ["launch", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=3", "--dry-run"]
    for target, expected in {
        "local:3": "--num-processes=3 --process-id=2",
        "slurm:2": "#SBATCH --nodes=2",
        "tpu-pod:x": "ssh x --worker=all",
    }.items():
        assert cli.main([*words, f"--target={target}"]) == 0
        printed = capsys.readouterr().out
        assert expected in printed
        assert f"train --config={config} --workdir={tmp_path / 'run'} --config.train.steps=3" in printed
        assert (target != "local:3") or printed.startswith(f"export {SECRET}=$(openssl rand -hex 32)\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target=slurm"], "--target=slurm: expected local:PROCESSES, slurm:HOSTS, k8s:HOSTS or tpu-pod:NAME"),
        (["--target=local:0"], "--target=local:0: expected local:PROCESSES"),
        (["--target=ray:2"], "--target=ray:2: expected local:PROCESSES"),
        (["--target=k8s:2"], "--target=k8s needs --image=IMAGE with postrain in it and --volume=CLAIM:/PATH"),
        (["--target=k8s:2", "--image=i", "--volume=c:/data"], "run: expected a folder in /data, the volume that all"),
        (["--target=slurm:2"], "--target=slurm:2 needs sbatch, which is not installed here: install it"),
        (["--target=tpu-pod:x", "--config.train.step=1"], "config key 'train.step' does not exist"),
        (["--target=local:2", "--config.model.path=nowhere"], "config key 'model.path' = 'nowhere' is a folder"),
    ],
)
def test_mistakes_are_refused_before_anything_is_submitted(config, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = cli.main(["launch", f"--config={config}", f"--workdir={tmp_path / 'run'}", *words])
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_local_processes_share_a_secret_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv(SECRET, "of whoever launches")
    (tmp_path / "python").write_text(
        '#!/bin/bash\n[[ "$*" == *$POSTRAIN_SECRET* ]] && exit 5\nprintenv POSTRAIN_SECRET >> "$0.out"\n'
    )
    (tmp_path / "python").chmod(0o755)
    assert launch.run_local(["train"], 3) == launch.run_local(["train"], 1) == 0
    found = (tmp_path / "python.out").read_text().splitlines()
    assert len(found) == 4 and len(set(found[:3])) == 1 and found[3] != found[0]
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in found)


def test_local_processes_end_together(monkeypatch, tmp_path):
    """One that fails before it meets the others does not leave them waiting for it."""
    monkeypatch.setattr(launch, "_SECONDS_TO_END", 0.5)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text('#!/bin/bash\n[[ "$*" == *--process-id=1* ]] && exit 5\nexec sleep 60\n')
    (tmp_path / "python").chmod(0o755)
    assert launch.run_local(["train"], 3) == 5
    (tmp_path / "python").write_text("#!/bin/bash\nkill -9 $$\n")
    assert launch.run_local(["train"], 2) == 137
