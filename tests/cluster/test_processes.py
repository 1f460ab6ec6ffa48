"""Several processes are one run: they find each other, and what ends one of them ends all, with its reason."""

import contextlib
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
from postrain.cluster import channel, discover
from postrain.cluster.authentication import (
    LONGEST,
    SECRET,
    Connection,
    WrongSecret,
    introduce,
    make_secret,
    read_secret,
)
from postrain.cluster.channel import Channel, Hub, ProcessesMissing, listen
from postrain.cluster.discover import Cluster, find_cluster, first_host
from postrain.cluster.launch import find_ports
from postrain.errors import UserError

HERE = pathlib.Path(__file__).parent
HOST = re.escape(socket.gethostname())
LOST = re.escape(channel.LOST)
WORD = "the secret of this run"


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
            env=os.environ | {SECRET: WORD},
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


def test_a_consequence_of_a_death_is_not_reported_as_the_cause():
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


def test_processes_that_count_differently_are_refused():
    port = find_ports()
    script = HERE / "process_check.py"
    counts = [("2", "0"), ("3", "1")]
    processes = [
        subprocess.Popen(
            [sys.executable, script, f"127.0.0.1:{port}", *words, "gather"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {SECRET: WORD},
        )
        for words in counts
    ]
    for process in processes:
        error = process.communicate(timeout=30)[1]
        assert process.returncode == 2
        assert "process 1" in error and "says that it is one of 3 processes, process 0 that there are 2" in error


@pytest.mark.parametrize(
    ("process", "message"),
    [(0, "not all 2 joined within 0 seconds; missing: 1: see why"), (1, "process 0 does not answer at 127.0.0.1:")],
)
def test_a_run_with_missing_processes_may_be_started_again(monkeypatch, capsys, process, message):
    """A machine was lost while the pods started: no user's error, after which Kubernetes would give the run up."""
    monkeypatch.setenv(SECRET, WORD)
    monkeypatch.setattr(channel, "SECONDS_TO_JOIN", 0.4)
    place = [f"--coordinator=127.0.0.1:{find_ports()}", "--num-processes=2", f"--process-id={process}"]
    assert cli.main(["train", "--config=c.py", "--workdir=run", *place]) == 143
    assert message in capsys.readouterr().err


def join_hub(port, secret=WORD, process=1, count=2, host="far"):
    """A connection that has introduced itself to the hub on 127.0.0.1, as a process with this secret does."""
    connection = Connection(socket.create_connection(("127.0.0.1", port)))
    assert introduce(connection, secret, {"process": process, "of": count, "host": host}, 10)
    return connection


def test_one_that_comes_late_hears_of_an_earlier_failure():
    """Process 1 counts wrongly and has ended before process 0's own connection is there."""
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    failed = {"failed": [1, "far", "says that it is one of 3 processes, process 0 that there are 2", 2]}
    assert join_hub(hub.address[1], count=3).receive(5) == failed
    assert join_hub(hub.address[1], process=0, host="near").receive(5) == failed
    assert hub.missing() == [1]


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ends, _ = start("gather", 1, coordinator=f"127.0.0.1:{port - 1}")
    assert ends[0][0] == 2 and f"port {port} of 127.0.0.1 cannot be listened on" in ends[0][2]


# Strangers: nobody without the secret joins, reads or ends a run


def test_a_stranger_changes_nothing():
    """Silent, of another protocol, or with another secret: the run goes on to its end."""
    port = find_ports()
    command = [sys.executable, HERE / "process_check.py", f"127.0.0.1:{port}", "2"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {SECRET: WORD}}
    processes = [subprocess.Popen([*command, "0", "gather"], **options)]
    silent = connect(port + 1)
    assert json.loads(silent.recv(1000)).keys() == {"nonce"}
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 4000 + b"\n",
        b"\xff\n",
        b"null\n",
        b'{"failed": [1, "x", "y", 2]}\n',
    ):
        stranger = connect(port + 1)
        stranger.sendall(words)
        assert stranger.makefile().read().count("\n") == 1, words  # the challenge, and it is closed
    with pytest.raises(WrongSecret, match=f"does not accept this process's {SECRET}"):
        join_hub(port + 1, "the secret of another run")
    claim = {"process": 1, "of": 2, "host": "x", "nonce": "0"}
    for proof in ("no", "\udc80", "", ["no"], None):
        stranger = connect(port + 1)
        stranger.sendall(json.dumps(claim | {"proof": proof}).encode() + b'\n{"failed": [1, "x", "y", 2]}\n')
        assert stranger.makefile().read().count("refused") == isinstance(proof, str)
    processes.append(subprocess.Popen([*command, "1", "gather"], **options))
    for process in processes:
        out, error = process.communicate(timeout=30)
        assert ("done" in out, error, process.returncode) == (True, "", 0)
    silent.close()


def connect(port, host="127.0.0.1"):
    """Waits for somebody to listen there."""
    for _ in range(200):
        try:
            return socket.create_connection((host, port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError(port)


def test_stalled_strangers_do_not_block_the_hub(monkeypatch):
    """Others may prove themselves meanwhile."""
    monkeypatch.setattr(channel, "_STRANGERS", 2)
    monkeypatch.setattr("postrain.cluster.authentication.SECONDS_TO_PROVE", 0.3)
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    stalled = [connect(hub.address[1]) for _ in range(5)]
    for one in stalled:
        one.sendall(b'{"hello":')
    channel._connect(hub.address, WORD, {"process": 1, "of": 2, "host": "far"}, time.monotonic() + 30)
    for _ in range(100):  # it is entered a moment after it has its answer
        if hub.missing() == [0]:
            break
        time.sleep(0.05)
    assert hub.missing() == [0]


@pytest.mark.parametrize("late", [False, True])
def test_a_process_that_proves_itself_as_the_hub_makes_room_is_in_or_tries_again(monkeypatch, late):
    """Never is it told that it is in and then sent away."""
    monkeypatch.setattr(channel, "_STRANGERS", -10)
    monkeypatch.setattr(channel, "_SECONDS_TO_LINGER", -1.0)
    monkeypatch.setattr(Hub, "_accept", lambda hub: None)
    hub, real = Hub(("127.0.0.1", 0), 2, WORD), channel.admit

    def admit_meanwhile(connection, secret, claim):
        def claim_between():
            if late:
                hub._send_away()
            claimed = claim()
            hub._send_away()
            return claimed

        return real(connection, secret, claim_between)

    monkeypatch.setattr(channel, "admit", admit_meanwhile)
    joined = []
    for process in (1, 0):
        connection = Connection(connect(hub.address[1]))
        connected, place = hub._listener.accept()
        hub._proving[connected] = time.monotonic()
        threading.Thread(target=hub._serve, args=(connected, place[0]), daemon=True).start()
        if introduce(connection, WORD, {"process": process, "of": 2, "host": "far"}, 5):
            joined.append(connection)
    assert [one.receive(5) for one in joined] == [{"hosts": ["far", "far"]}] * (0 if late else 2)
    assert not hub._proving
    hub._listener.close()


def test_a_crowd_of_strangers_leaves_room_for_a_process():
    """Port scanners that say nothing, something else, or a byte at a time, far more of them than are let in."""
    hub, begun = Hub(("127.0.0.1", 0), 2, WORD), time.monotonic()
    crowd = [connect(hub.address[1]) for _ in range(200)]
    tls_hello = bytes.fromhex("16030100750100007103") + os.urandom(100)
    for number, words in enumerate((b"GET / HTTP/1.1\r\nHost: x\r\n", tls_hello, os.urandom(4000), b"\0" * 9000, b"{")):
        crowd[number].sendall(words)
    stopped = threading.Event()

    def send_slowly():
        with contextlib.suppress(OSError):
            while not stopped.wait(0.02):
                crowd[-1].sendall(b" ")

    slow = threading.Thread(target=send_slowly)
    slow.start()
    joined = join_hub(hub.address[1])
    assert time.monotonic() - begun < 5, "it waited until strangers were given up"
    time.sleep(channel._SECONDS_TO_LINGER + 2 * channel._TICK)
    assert len(hub._proving) <= 2 + channel._STRANGERS, "threads and files of those who prove nothing"
    join_hub(hub.address[1], process=0)
    assert joined.receive(5) == {"hosts": ["far", "far"]}
    stopped.set()
    slow.join()
    for one in crowd:
        one.close()


def test_a_message_without_end_is_not_collected():
    """Of a process that knows the secret, too: the run ends, and memory does not."""
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    other, lead = join_hub(hub.address[1]), join_hub(hub.address[1], process=0)
    assert lead.receive(5) == {"hosts": ["far", "far"]}
    with contextlib.suppress(OSError):
        for _ in range(LONGEST // (1 << 20) + 8):
            other._socket.sendall(b"[" * (1 << 20))
    assert lead.receive(10) == {"failed": [1, "far", channel.LOST, channel.LOST_CODE]}


def test_a_value_that_the_others_would_not_read_is_refused_where_it_is(monkeypatch):
    hub = Hub(("127.0.0.1", 0), 1, WORD)
    own = Channel(hub.address, 0, 1, WORD, hub, lambda failure: None)
    monkeypatch.setattr(channel, "LONGEST", 1000)
    with pytest.raises(
        UserError, match=r"several processes: 1,0\d\d bytes are to be sent .* at most 1,000: lower data"
    ):
        own.gather("x" * 1000)
    assert own.gather("x") == ["x"]
    own.leave()


def test_a_proof_is_good_for_one_connection():
    """Who has read all that one connection carried cannot join by sending it again."""
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    sent = []

    class Recorded(Connection):
        def send(self, message):
            sent.append(message)
            super().send(message)

    assert introduce(Recorded(connect(hub.address[1])), WORD, {"process": 1, "of": 2, "host": "a"}, 10)
    stranger = Connection(connect(hub.address[1]))
    assert stranger.receive(10).keys() == {"nonce"}
    stranger.send(sent[0])
    assert stranger.receive(10) == {"refused": "secret"} and hub.missing() == [0]
    assert WORD not in json.dumps(sent)


@pytest.mark.parametrize("proof", ["0" * 64, None, "echo"])
def test_an_impostor_in_the_place_of_process_0_is_refused(proof):
    """Also one that sends a process's own proof back to it."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer():
            connection = Connection(impostor.accept()[0])
            connection.send({"nonce": "1"})
            said = connection.receive(10)
            connection.send({"proof": said["proof"] if proof == "echo" else proof})
            connection.receive(10)

        threading.Thread(target=answer, daemon=True).start()
        address = impostor.getsockname()
        with pytest.raises(WrongSecret) as refused:
            Channel(address, 1, 2, WORD, None, lambda failure: None)
    place = re.escape(f"{address[0]}:{address[1]}")
    assert re.fullmatch(
        rf"several processes: process 0 at {place} does not know this process's {SECRET}: expected the same .*",
        str(refused.value),
    )


def test_a_process_with_another_secret_says_what_to_do():
    """In one line; process 0, should it wait in vain, says from where it came."""
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    command = [sys.executable, HERE / "process_check.py", f"127.0.0.1:{hub.address[1] - 1}", "2", "1", "gather"]
    environment = os.environ | {SECRET: "the secret of another run"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"does not accept this process's {SECRET}: expected the same in all of them: set {SECRET}" in result.stderr
    assert f"missing: 0, 1; refused, for another {SECRET}: 127.0.0.1: see why" in str(hub.missing_error())


@pytest.mark.parametrize(
    ("secret", "message"),
    [(None, f"{SECRET} is not set: expected the same random text in all"), ("short", f"{SECRET} has 5 characters")],
)
def test_several_processes_need_a_secret(secret, message):
    environment = {name: value for name, value in os.environ.items() if name != SECRET}
    command = [sys.executable, HERE / "process_check.py", f"127.0.0.1:{find_ports()}", "2", "0", "gather"]
    environment |= {SECRET: secret} if secret else {}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    assert message in result.stderr and "openssl rand -hex 32" in result.stderr
    assert len(read_secret(1, {})) == 64  # one process makes its own
    assert make_secret() != make_secret()


# The address that the hub listens on


def test_the_hub_listens_on_the_coordinators_address_alone():
    """The machine's other addresses do not answer; all of 127.0.0.0/8 are this machine's."""
    hub = Hub(("127.0.0.2", 0), 2, WORD)
    connect(hub.address[1], hub.address[0]).close()
    for other in ("127.0.0.1", "127.0.0.3"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, hub.address[1]), timeout=5)


def test_jax_listens_there_too():
    ends, _ = start("jax", 1, coordinator=f"127.0.0.2:{find_ports()}")
    assert ends[0][:2] == (0, "127.0.0.2 True\n127.0.0.1 False\ndone\n"), ends[0]


def test_the_port_closes_when_all_have_joined():
    hub = Hub(("127.0.0.1", 0), 2, WORD)
    joined = [join_hub(hub.address[1], process=process) for process in (0, 1)]
    assert all(connection.receive(5) == {"hosts": ["far", "far"]} for connection in joined)
    with pytest.raises(ConnectionRefusedError):
        for _ in range(100):
            socket.create_connection(hub.address, timeout=5).close()
            time.sleep(0.1)


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0"])
def test_an_address_that_is_not_process_0s_is_refused(host):
    with pytest.raises(UserError, match=rf"{re.escape(host)}: expected an address of process 0's own machine"):
        listen(host, 0)


def test_an_address_that_others_reach_is_preferred(monkeypatch):
    """Debian's /etc/hosts has the machine's own name as 127.0.1.1."""
    name = lambda *addresses: lambda *_, **__: [(socket.AF_INET, 1, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", name("127.0.1.1", "192.0.2.7"))
    monkeypatch.setattr(socket, "create_server", lambda place, **_: place[0])
    assert listen("node", 0) == "192.0.2.7"
    monkeypatch.undo()
    monkeypatch.setattr(socket, "getaddrinfo", name("127.0.1.1"))
    error = Hub(("node", 0), 2, WORD).missing_error()
    assert error.exit_code == 2 and "'node' is 127.0.1.1 on its own machine, which no other machine reaches" in str(
        error
    )


def test_an_unknown_name_is_looked_up_again(monkeypatch):
    """Kubernetes' DNS knows a new pod a little later than the pod itself."""
    answers, real = [socket.gaierror(-2, "Name or service not known")] * 2, socket.getaddrinfo

    def look_up(*args, **options):
        if answers:
            raise answers.pop()
        return real("127.0.0.1", *args[1:], **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    listen("pod-0", 0).close()
    answers += [socket.gaierror(-2, "Name or service not known")] * 100
    monkeypatch.setattr(channel, "SECONDS_TO_RESOLVE", 0.0)
    with pytest.raises(ProcessesMissing, match="process 0 cannot look up its own name, the coordinator's 'pod-0'"):
        listen("pod-0", 0)


# Which process of how many


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
NO_SLICES = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"}


def place(environment, **settings):
    found = find_cluster(environment=environment, **settings)
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


@pytest.mark.parametrize(
    ("name", "environment"),
    [("Slurm", SLURM | {"SLURM_NTASKS": "4"}), ("Ompi", MPI | URI), ("GkeTpu", TPU), ("GkeTpu", TPU | SLICES)],
)
def test_the_same_is_found_as_by_jax(monkeypatch, name, environment):
    """jax has no public function for it, and may move this one."""
    clusters = pytest.importorskip("jax._src.clusters")
    detected = getattr(clusters, f"{name}Cluster")
    for variable, value in ({"MEGASCALE_COORDINATOR_ADDRESS": ""} | NO_SLICES | environment).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.1")  # jax waits until DNS knows it
    host = detected.get_coordinator_address(timeout_secs=1, override_coordinator_port=None).rpartition(":")[0]
    found = (host, detected.get_process_count(), detected.get_process_id())
    assert place(environment)[:3] == found


def test_flags_come_first_and_may_name_the_machine_alone():
    assert place(SLURM, coordinator="h:9000", num_processes=2, process_id=1) == ("h", 2, 1, None)
    assert place(SLURM, coordinator="h:9000") == ("h", 4, 2, None)
    assert place(MPI, coordinator="h:9000") == ("h", 2, 1, None)
    assert find_cluster("h:9000", 1, 0, {}).num_processes == 1  # set explicitly, so it is one of one


def test_all_of_a_job_choose_the_same_port_and_other_jobs_another():
    port = lambda environment: find_cluster(environment=environment).coordinator.split(":")[1]
    assert port(SLURM) == port(SLURM | {"SLURM_PROCID": "0"}) != port(SLURM | {"SLURM_JOB_ID": "4712"})
    assert find_cluster(environment=SLURM).channel_address == ("gpu07", int(port(SLURM)) + 1)
    assert Cluster("[fe80::1]:80", 2, 0, "").channel_address == ("fe80::1", 81)


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
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
def test_half_a_setting_is_refused(environment, settings, words):
    with pytest.raises(UserError) as refused:
        find_cluster(environment=environment, **settings)
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
    monkeypatch.setattr(discover, "has_tpu", lambda: True)
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
