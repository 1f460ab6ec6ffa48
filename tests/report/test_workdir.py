"""Any change of metrics.jsonl and samples.jsonl since a checkpoint is found, but for lines added to them."""

import os

import pytest

from postrain.errors import UserError
from postrain.report.workdir import REPORTS, find_changed_reports, report_facts

TEXT = '{"step": 1}\n{"step": 2}\n'


def spoil(path, damage):
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, len(TEXT) // 2)
    elif damage == "changed":
        path.write_text(TEXT.replace("2", "3"))
    else:
        path.write_text(TEXT + '{"step": 3}\n')


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "(expected 24 bytes, found 0)"),
        ("cut", "(expected 24 bytes, found 12)"),
        ("changed", "(its content has changed)"),
        ("added to", None),
    ],
)
def test_a_file_that_does_not_begin_as_it_did_is_named(tmp_path, name, damage, words):
    assert report_facts(tmp_path) == {}
    for other in REPORTS:
        (tmp_path / other).write_text(TEXT)
    before = report_facts(tmp_path)
    assert set(before) == set(REPORTS) and find_changed_reports(tmp_path, before) == []
    spoil(tmp_path / name, damage)
    found = find_changed_reports(tmp_path, before)
    if words is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(f"{tmp_path / name}: not as the checkpoint saw it {words}")


def test_a_report_that_cannot_be_read_is_an_error(tmp_path):
    path = tmp_path / REPORTS[0]
    path.write_text(TEXT)
    before = report_facts(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        find_changed_reports(tmp_path, before)
