"""A folder of pieces shared by processes, any of which may be killed at any instant."""

import os
import random
import subprocess
import sys
import time

from postrain.data.files.remote import PieceCache

LIMIT = 600_000
WORKER = """
import os, random, sys
from postrain.data.files.remote import PieceCache

def piece(key):
    return random.Random(key).randbytes(random.Random(key).randint(1_000, 60_000))

cache, keys = PieceCache(sys.argv[1], int(sys.argv[2])), random.Random(sys.argv[3])
while True:
    key = keys.randint(0, 60)
    found = cache.get(str(key))
    if found is None:
        cache.put(str(key), piece(key))
    elif found != piece(key):
        sys.exit("wrong bytes")
"""


def folder_bytes(folder):
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size * (entry.name != "lock")
        except FileNotFoundError:  # removed since
            continue
    return total


def test_killed_writers_leave_right_bytes_under_the_limit(tmp_path):
    def start(seed):
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(LIMIT), str(seed)])

    moments, largest = random.Random(0), 0
    workers = [start(seed) for seed in range(3)]
    while folder_bytes(tmp_path) < LIMIT // 2:
        time.sleep(0.01)
    for kill in range(15):
        time.sleep(moments.uniform(0, 0.1))
        largest = max(largest, *(folder_bytes(tmp_path) for _ in range(20)))
        worker = workers[kill % 3]
        worker.kill()
        assert worker.wait() == -9  # it had found no wrong bytes
        workers[kill % 3] = start(3 + kill)
    for worker in workers:
        worker.kill()
        worker.wait()
    assert LIMIT // 2 < largest <= LIMIT
    names = {}
    exec(WORKER.split("cache, keys")[0], names)
    found = [PieceCache(tmp_path, LIMIT).get(str(key)) for key in range(61)]
    assert sum(f is not None for f in found) > 5
    assert all(f in (None, names["piece"](key)) for key, f in enumerate(found))


def test_the_sum_is_right_after_the_oldest_have_gone(tmp_path):
    cache = PieceCache(tmp_path, 1_000)
    for i in range(8):
        cache.put(str(i), bytes(196))  # 200 with its checksum
        time.sleep(0.01)  # file systems tell times to some milliseconds
        assert int((tmp_path / "lock").read_text()) == folder_bytes(tmp_path) <= 1_000
    assert [i for i in range(8) if cache.get(str(i))] == [3, 4, 5, 6, 7]
    cache.put("large", bytes(1_000))
    assert cache.get("large") is None and cache.get("7")
    PieceCache(tmp_path, 500).put("new", bytes(196))  # a smaller limit from now on
    assert folder_bytes(tmp_path) <= 500 and cache.get("new")
