"""The model folder under a run's checkpoints: any change of its files is seen."""

import numpy as np
import pytest
import safetensors.numpy

from postrain.checkpoint import record
from postrain.checkpoint.record import fingerprint_folder, fingerprint_model
from postrain.errors import UserError

FILE = "model.safetensors"


def fingerprint(folder, tensors, **options):
    safetensors.numpy.save_file(tensors, folder / FILE)
    return fingerprint_folder(folder, **options)[FILE]


def test_one_changed_weight_is_seen_wherever_it_is(tmp_path):
    """Of 40 MB, in more stretches than one: each position is far from every place that samples would look at."""
    array = np.zeros(10 << 20, np.float32)
    seen = {fingerprint(tmp_path, {"a": array})["hash"]}
    positions = np.random.default_rng(0).integers(0, len(array), 6)
    for position in positions:
        changed = array.copy()
        changed[position] = 1
        found = fingerprint(tmp_path, {"a": changed})
        assert found["bytes"] > array.nbytes
        seen.add(found["hash"])
    seen.add(fingerprint(tmp_path, {"b": array})["hash"])
    assert len(seen) == len(positions) + 2
    assert fingerprint(tmp_path, {"a": array})["hash"] in seen


def test_of_a_very_large_folder_every_tensor_is_sampled(tmp_path):
    """A change of all of any one tensor is seen, and of the ends of each; tensors lie in order of their names."""
    tensors = {"a": np.zeros(3, np.float32), "b": np.zeros(3 << 20, np.float32), "c": np.zeros((5, 1 << 19), np.int64)}
    sampled = {"whole_bytes": 1 << 20}
    first = fingerprint(tmp_path, tensors, **sampled)["hash"]
    assert first != fingerprint_folder(tmp_path)[FILE]["hash"]
    for name, array in tensors.items():
        for change in (slice(None), slice(0, 1), slice(-1, None)):
            changed = array.copy()
            changed.reshape(-1)[change] = 1
            assert fingerprint(tmp_path, tensors | {name: changed}, **sampled)["hash"] != first, (name, change)
    assert fingerprint(tmp_path, tensors, **sampled)["hash"] == first
    hidden = tensors["b"].copy()
    hidden[len(hidden) // 30] = 1  # between the first two samples: this is what a large folder may hide
    assert fingerprint(tmp_path, tensors | {"b": hidden}, **sampled)["hash"] == first
    assert record.WHOLE_BYTES == 20 * 10**9


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected \*.safetensors files, found none"):
        fingerprint_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_stands_beside_the_weights_counts(tmp_path, name):
    fingerprint(tmp_path, {"a": np.zeros(3, np.float32)})
    seen = [fingerprint_model(tmp_path)["files"][name]]
    for text in ('{"eos_token_id": 1}', '{"eos_token_id": 2}'):
        (tmp_path / name).write_text(text)
        seen.append(fingerprint_model(tmp_path)["files"][name])
    assert seen[0] is None and len(set(map(str, seen))) == 3
