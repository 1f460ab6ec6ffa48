"""The order of examples is the same on 1, 2, 4, 8 devices, of 1, 2, 4 processes, and from one to another."""

import json
import pathlib
import subprocess
import sys

import pytest
from orders import SAVED, STEPS, WAYS


@pytest.fixture(scope="module")
def orders():
    script = pathlib.Path(__file__).with_name("orders.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_every_number_of_devices_and_processes_sees_the_same_examples_in_the_same_order(orders, way):
    found = {name.removeprefix(f"{way}, "): updates for name, updates in orders.items() if name.startswith(f"{way}, ")}
    expected = found["1 devices, 1 processes"]
    assert len(expected) == STEPS and all(len(rows) == 8 and all(ids for ids, _ in rows) for rows in expected)
    assert len({ids for rows in expected for ids, _ in rows}) > STEPS * 8 // 2, "packed rows, hardly any twice"
    layouts = [(count, 1) for count in (1, 2, 4, 8)] + [(8, 2), (8, 4)]
    assert len(found) == len(layouts) + 5
    for devices, processes in layouts:
        assert found[f"{devices} devices, {processes} processes"] == expected, (devices, processes)
        if processes != 2:  # whose position it is
            resumed = found[f"{devices}, resumed devices, {processes} processes"]
            assert resumed == expected[SAVED:], (devices, processes)
