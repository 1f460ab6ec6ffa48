"""Several processes are one run: they find each other, and what ends one of them ends all, with its reason."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from postrain import cli
from postrain.cluster import channel as control
from postrain.cluster import discover as cluster
from postrain.cluster.channel import Hub
from postrain.cluster.discover import Cluster, find_cluster, first_host
from postrain.cluster.launch import find_ports
from postrain.errors import UserError

HERE = pathlib.Path(__file__).parent
HOST = re.escape(socket.gethostname())
LOST = r"died without a word \(killed, out of memory, or its machine is gone\)"


def start(case, count=3, *, coordinator=None, claim=None):
    """(exit code, stdout, stderr) of every process, and the seconds until the last had ended."""
    coordinator = coordinator or f"127.0.0.1:{find_ports()}"
    begun = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "process_check.py", coordinator, str(claim or count), str(process), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    ends = [process.communicate(timeout=60) for process in processes]
    seconds = time.monotonic() - begun
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)], seconds


def test_all_get_what_all_said():
    ends, _ = start("gather")
    expected = json.dumps([[0, 1, 2], [{"twice": 0}, {"twice": 2}, {"twice": 4}]])
    assert ends == [(0, f"{expected}\ndone\n", "")] * 3


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_error_of_one_is_the_error_of_all(culprit):
    ends, seconds = start(f"error{culprit}")
    assert [code for code, _, _ in ends] == [2, 2, 2]
    for process, (_, _, error) in enumerate(ends):
        prefix = "" if process == culprit else rf"process {culprit} \({HOST}\) stopped: "
        assert re.fullmatch(rf"error: {prefix}data.jsonl:7: no assistant message\n", error), error
    assert seconds < 30  # jax would take minutes


def test_a_bug_of_one_stops_all_and_keeps_its_traceback():
    ends, _ = start("bug1")
    assert [code for code, _, _ in ends] == [1, 1, 1]
    assert "Traceback" in ends[1][2] and "ZeroDivisionError: by zero" in ends[1][2]
    for process in (0, 2):
        assert re.fullmatch(rf"error: process 1 \({HOST}\) stopped: ZeroDivisionError: by zero\n", ends[process][2])


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_that_is_killed_is_named_by_the_others(culprit):
    ends, seconds = start(f"killed{culprit}")
    assert [code for code, _, _ in ends] == [-9 if process == culprit else 143 for process in range(3)]
    for process in {0, 1, 2} - {culprit}:
        assert re.fullmatch(rf"error: process {culprit} \({HOST}\) {LOST}\n", ends[process][2])
    assert seconds < 30  # jax would take minutes


def test_what_follows_from_a_death_is_not_told_as_the_cause():
    ends, _ = start("consequence")
    assert [code for code, _, _ in ends] == [143, -9, 143]
    for process in (0, 2):
        assert re.fullmatch(rf"error: process 1 \({HOST}\) {LOST}\n", ends[process][2])


def test_nobody_is_done_before_all_are():
    ends, _ = start("last")
    assert [code for code, _, _ in ends] == [2, 2, 2]
    assert all("done" not in out for _, out, _ in ends)


def test_all_stop_after_the_same_step():
    ends, _ = start("stop")
    assert [code for code, _, _ in ends] == [143, 143, 143]
    assert len({out for _, out, _ in ends}) == 1 and re.fullmatch(r"stopped after \d+\n", ends[0][1])


def test_processes_that_count_differently_are_told():
    port = find_ports()
    script = HERE / "process_check.py"
    counts = [("2", "0"), ("3", "1")]
    processes = [
        subprocess.Popen(
            [sys.executable, script, f"127.0.0.1:{port}", *words, "gather"], stderr=subprocess.PIPE, text=True
        )
        for words in counts
    ]
    for process in processes:
        error = process.communicate(timeout=30)[1]
        assert process.returncode == 2
        assert "process 1" in error and "says that it is one of 3 processes, process 0 that there are 2" in error


@pytest.mark.parametrize(
    ("process", "message"),
    [(0, "not all 2 came within 0 seconds; missing: 1"), (1, "process 0 does not answer at 127.0.0.1:")],
)
def test_where_some_do_not_come_the_run_may_be_started_again(monkeypatch, capsys, process, message):
    """A machine was lost while the pods started: no user's error, after which Kubernetes would give the run up."""
    monkeypatch.setattr(control, "SECONDS_TO_MEET", 0.4)
    place = [f"--coordinator=127.0.0.1:{find_ports()}", "--num-processes=2", f"--process-id={process}"]
    assert cli.main(["train", "--config=c.py", "--workdir=run", *place]) == 143
    assert message in capsys.readouterr().err


def test_one_that_comes_late_hears_of_an_earlier_failure():
    """Process 1 counts wrongly and is gone before process 0's own connection is there."""
    port = find_ports()
    hub = Hub(port, 2)
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b'{"hello": 1, "of": 3, "host": "far"}\n')
    assert b"says that it is one of 3 processes" in stranger.recv(1000)
    late = socket.create_connection(("127.0.0.1", port))
    late.sendall(b'{"hello": 0, "of": 2, "host": "near"}\n')
    late.settimeout(5)
    assert json.loads(late.recv(1000))["failed"] == [
        1,
        "far",
        "says that it is one of 3 processes, process 0 that there are 2",
        2,
    ]
    assert hub.missing() == [1]


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ends, _ = start("gather", 1, coordinator=f"127.0.0.1:{port - 1}")
    assert ends[0][0] == 2 and f"port {port} of this machine cannot be listened on" in ends[0][2]


def test_a_stranger_who_knocks_changes_nothing():
    port = find_ports()
    command = [sys.executable, HERE / "process_check.py", f"127.0.0.1:{port}", "2"]
    processes = [subprocess.Popen([*command, "0", "gather"], stdout=subprocess.PIPE, text=True)]
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert stranger.recv(10) == b""
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    processes.append(subprocess.Popen([*command, "1", "gather"], stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert "done" in process.communicate(timeout=30)[0] and process.returncode == 0


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
POD = {"POSTRAIN_COORDINATOR": "run-workers-0-0.run:8476", "POSTRAIN_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "3"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"}


def place(environment, **given):
    found = find_cluster(environment=environment, **given)
    return found and (found.coordinator.split(":")[0], found.num_processes, found.process_id, found.local_device_ids)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # one of many runs, not of many processes
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # the batch script, no step
        (SLURM, ("gpu07", 4, 2, None)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, ("gpu07", 4, 2, (1,))),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "3"}, ("gpu07", 4, 2, None)),
        (MPI | URI, ("10.96.0.1", 2, 1, None)),
        (MPI | {"PMIX_NAMESPACE": "prterun-gpu-07-28157@1"}, ("gpu-07", 2, 1, None)),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, ("127.0.0.1", 2, 1, (1,))),
        (SLURM | MPI | URI, ("10.96.0.1", 2, 1, None)),
        (POD, ("run-workers-0-0.run", 4, 3, None)),
        (TPU, ("t0", 4, 3, None)),
        (TPU | SLICES, ("s0", 8, 7, None)),
        (TPU | {"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_the_environment_says_who_one_is(environment, expected):
    assert place(environment) == expected


def test_flags_come_first_and_may_name_the_machine_alone():
    assert place(SLURM, coordinator="h:9000", num_processes=2, process_id=1) == ("h", 2, 1, None)
    assert place(SLURM, coordinator="h:9000") == ("h", 4, 2, None)
    assert place(MPI, coordinator="h:9000") == ("h", 2, 1, None)
    assert find_cluster("h:9000", 1, 0, {}).num_processes == 1  # asked for, so it is one of one


def test_all_of_a_job_choose_the_same_port_and_other_jobs_another():
    port = lambda environment: find_cluster(environment=environment).coordinator.split(":")[1]
    assert port(SLURM) == port(SLURM | {"SLURM_PROCID": "0"}) != port(SLURM | {"SLURM_JOB_ID": "4712"})
    assert find_cluster(environment=SLURM).control == ("gpu07", int(port(SLURM)) + 1)
    assert Cluster("[fe80::1]:80", 2, 0, "").control == ("fe80::1", 81)


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        ({}, {"coordinator": "h:1"}, "found --coordinator=h:1 without --num-processes and --process-id"),
        ({"POSTRAIN_PROCESS_ID": "1"}, {"num_processes": 2}, "found --num-processes=2, POSTRAIN_PROCESS_ID=1 without"),
        (SLURM, {"num_processes": 2}, "found --num-processes=2 without --coordinator and --process-id"),
        ({"POSTRAIN_PROCESS_ID": "1"}, {"process_id": 0}, "--process-id=0, but POSTRAIN_PROCESS_ID=1: leave one"),
        ({}, {"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process 2 of 2 (--coordinator=h:1, --num"),
        ({}, {"coordinator": "h", "num_processes": 2, "process_id": 1}, "coordinator 'h' (--coordinator=h, --num-pro"),
        (POD | {"POSTRAIN_NUM_PROCESSES": "four"}, {}, "POSTRAIN_NUM_PROCESSES='four': expected a whole number"),
        (SLURM | {"SLURM_PROCID": "4"}, {}, "process 4 of 4 (SLURM_PROCID=4, SLURM_STEP_NUM_TASKS=4)"),
        (MPI, {}, "OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2, but Open MPI does not say where process 0 is"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU_WORKER_ID=''"),
    ],
)
def test_half_a_setting_is_refused(environment, given, words):
    with pytest.raises(UserError) as refused:
        find_cluster(environment=environment, **given)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node001", "node001"), ("a,b", "a"), ("n[3-4],b", "n3"), ("n[007,9]", "n007"), ("r1n[02-04]-ib,x", "r1n02-ib")],
)
def test_the_first_of_slurms_machines(nodes, first):
    assert first_host(nodes) == first


def test_a_tpu_vm_asks_its_metadata_server(monkeypatch):
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "x:y:10.0.0.2,x:y:10.0.0.3",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            value = (
                attributes.get(self.path.rpartition("/")[2]) if self.headers["Metadata-Flavor"] == "Google" else None
            )
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    assert find_cluster(environment=environment) is None  # no TPU here
    monkeypatch.setattr(cluster, "has_tpu", lambda: True)
    assert place(environment) == ("10.0.0.2", 4, 3, None)
    attributes["tpu-env"] = ""
    assert place(environment) == ("10.0.0.2", 2, 1, None)
    del attributes["agent-worker-number"]
    assert place(environment) is None
    server.shutdown()


def test_joining_needs_no_jax():
    """So that a wrong key is answered at once, in several processes too."""
    script = "import sys, postrain.cluster.processes, postrain.cluster.launch; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert result.stdout == "False\n", result.stderr
