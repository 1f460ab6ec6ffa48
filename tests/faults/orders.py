"""Which example is in which row of which update, on devices of real processes. Prints a JSON object.

    python tests/faults/orders.py

Two processes of four devices read first, and save their position after update SAVED; one process reads with 1, 2, 4 and
8 of its eight devices, from the start and from that position; so do four processes of two devices.
"""

import functools
import importlib
import json
import pathlib
import sys
import tempfile
import zlib

import kills
import numpy as np

sys.path.insert(0, str(kills.HERE.parent / "data"))
STEPS, SAVED, BATCH = 14, 5, 8
WAYS = {
    "in memory": {},
    "mixed": {"mixture": {"phases": [{"step": 9, "weights": [1.0, 3.0]}]}},
    "streamed": {"streaming": True, "stream": {"shards": 4}},
    "streamed and mixed": {
        "streaming": True,
        "stream": {"shards": 2},
        "mixture": {"by": "rows", "phases": [{"step": 7, "weights": [1.0, 1.0]}]},
    },
}
ONE, TWO, FOUR = (1, 8), (2, 4), (4, 2)  # processes, devices of each


def make_inputs(folder: pathlib.Path) -> None:
    """A tokenizer, and two sources of ragged rows, of several files each."""
    from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

    make_tokenizer_folder(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, files in (("a", 5), ("b", 2)):
        for number in range(files):
            texts = [" ".join(["word"] * int(rng.integers(1, 25))) for _ in range(30)]
            lines = [chat(f"{name} {number} {i}?", text) for i, text in enumerate(texts)]
            write_jsonl(folder / f"{name}-{number:02}.jsonl", lines)


def make_config(folder: pathlib.Path, way: str):
    from postrain.config import resolve

    weights = {"a": 3.0, "b": 1.0} if "mixed" in way else {}
    sources = [{"path": f"{folder}/{name}-*.jsonl", "name": name, "weight": weights.get(name, 0.0)} for name in "ab"]
    data = {"train": sources, "sequence_length": 160, "batch_size": BATCH, "packing_window": 32, "seed": 3}
    return resolve({"model": {"path": "unread"}, "data": data | WAYS[way], "train": {"steps": STEPS}}).data


def read(folder: pathlib.Path, way: str, devices, position: dict | None) -> tuple[list, dict]:
    """[[ids, checksum of the tokens on the device] of each row] of each update, and the position after SAVED."""
    from postrain.cluster.processes import gather
    from postrain.config import MeshConfig
    from postrain.data.batches.open import join_positions, open_train_rows
    from postrain.data.rendering.tokenizer import load_tokenizer
    from postrain.sharding import data_process, make_global_batch, make_mesh

    mesh = make_mesh(MeshConfig(), devices)
    index, count = data_process(mesh)
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = open_train_rows(tokenizer, make_config(folder, way), process_index=index, process_count=count)
    batches, updates, saved = rows.batches, [], {}
    if position is not None:
        batches.set_state(position)
    for step in range(SAVED if position is not None else 0, STEPS):
        arrays = next(batches)
        ids = [batches.describe_rows(row).replace(f"{folder}/", "") for row in arrays.pop("row_ids")]
        own = {index * len(ids) + i: [text] for i, text in enumerate(ids)}
        for shard in make_global_batch(arrays, mesh)["tokens"].addressable_shards:
            for row, tokens in enumerate(np.asarray(shard.data), shard.index[0].start or 0):
                own[row] = [own[row][0], zlib.crc32(tokens.tobytes())]
        found = {int(row): what for part in gather(own) for row, what in part.items()}
        updates.append([found[row] for row in range(BATCH)])
        if step + 1 == SAVED:
            saved = join_positions(gather(batches.get_state()))
    batches.close()
    return updates, saved


def work(folder: pathlib.Path, layout: tuple[int, int], index: int = 0, port: int = 0) -> None:
    """One process of a layout; the first writes what all have read."""
    import jax

    from postrain import cli
    from postrain.cluster.discover import find_cluster
    from postrain.cluster.processes import current, join

    processes, devices = layout
    jax.config.update("jax_num_cpu_devices", devices)
    cluster = find_cluster(f"127.0.0.1:{port}", processes, index) if processes > 1 else None
    with join(cluster, cli.explain):
        if processes > 1:
            current().start_jax()
        positions = {} if layout == TWO else json.loads((folder / "2.json").read_text())["positions"]
        found = {"rows": {}, "positions": {}}
        for way in WAYS:
            for count in (1, 2, 4, 8) if layout == ONE else (8,):
                own = jax.devices()[:count]
                found["rows"][f"{way}, {count}"], found["positions"][way] = read(folder, way, own, None)
                if positions:
                    found["rows"][f"{way}, {count}, resumed"], _ = read(folder, way, own, positions[way])
    if index == 0:
        (folder / f"{processes}.json").write_text(json.dumps(found))


def main() -> None:
    for module in ("postrain.sharding", "postrain.cli", "postrain.data.batches.open", "postrain.cluster.processes"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="orders") as folder:
        folder = pathlib.Path(folder)
        log = folder / "log"
        status, found = kills.fork(functools.partial(make_inputs, folder), log), {}
        for layout in (TWO, ONE, FOUR):
            if not status:
                each = functools.partial(work, folder, layout)
                status = kills.fork(each, log) if layout == ONE else kills.fork_all(each, log, layout[0])[0]
        if status:
            raise SystemExit(log.read_text())
        for processes, _ in (ONE, TWO, FOUR):
            rows = json.loads((folder / f"{processes}.json").read_text())["rows"]
            found |= {f"{name} devices, {processes} processes": updates for name, updates in rows.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
