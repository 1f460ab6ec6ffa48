"""The data pipeline: packing, preparation beside TRL, packed against padded training, memory of a long stream.

    python tests/benchmarks/data.py --write                              # all four, into docs/benchmarks.md
    python tests/benchmarks/data.py --case packing --write               # one: packing, preparation, step or stream
    python tests/benchmarks/data.py --case stream --rows 10000000 --write

* packing: ``--lengths`` lengths, a window of 10,000, beside TRL's best-fit (``pack_dataset``, "bfd", in batches of as
  many, on lists of nulls, so that it moves no tokens).
* preparation: JSON lines to packed batches, ``--conversations`` rows, beside what TRL's SFTTrainer does with the same
  rows and the same template before training: template with the mask of assistant tokens, tokens, labels, packing. On
  one core, to which the process is held and whose time is counted, and on all (TRL with ``dataset_num_proc``). TRL's
  collator, which makes batches of its rows, is not timed, and neither is loading the tokenizer.
* step: useful tokens/s of the train step on the tiny model, packed and with a document a row, at a quarter of the
  lengths. Documents are padded to ``data.sequence_length``, as the step has one shape; the ceiling of packing's gain
  is then slots over useful tokens. Padded rows are of documents at evenly spaced quantiles. As this step leaves out
  the attention and the loss of padding, it is also timed on rows full of one document, where each slot costs the same.
* stream: the resident memory of a process that streams ``--rows`` short rows of 8 files.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time

import data_workloads
import numpy as np
import runner
import workloads
from runner import Bar, describe_versions

PACKED = (("records", 4096), ("records", 8192), ("stress", 8192), ("replies", 2048))
PREPARED = ("records", "short")
PREPARED_LENGTH, WINDOW = 8192, 10_000
SCALE, QUANTILES = 4, 16
STEPS = {"records": (1024, 4), "stress": (2048, 2), "skewed": (2048, 2)}  # sequence length, rows of an update
ROUNDS = {"packing": 3, "preparation": 2, "step": 2, "stream": 1}  # where --rounds does not say
SIDES = {
    "packing": ("postrain", "trl"),
    "preparation": ("postrain", "trl", "postrain_all_cores", "trl_all_cores"),
    "step": ("packed", "padded", "full"),
    "stream": ("stream",),
}


def pack_all(side: str, count: int) -> dict:
    figures = {}
    for name, capacity in PACKED:
        lengths, longer = data_workloads.draw_fitting(name, capacity, count)
        seconds, rows = (_pack_here if side == "postrain" else _pack_trl)(lengths, capacity)
        padding = 1 - int(lengths.sum()) / (rows * capacity)
        figures[f"{name}, {capacity:,}"] = {"seconds": seconds, "padding": padding, "longer": longer}
    return figures


def _pack_here(lengths: np.ndarray, capacity: int) -> tuple[float, int]:
    from postrain.data.batches.packing import pack

    start = time.perf_counter()
    rows = pack(lengths, capacity, window=WINDOW)
    return time.perf_counter() - start, len(rows)


def _pack_trl(lengths: np.ndarray, capacity: int) -> tuple[float, int]:
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))
    dataset = datasets.Dataset(pa.table({"input_ids": column}))
    start = time.perf_counter()
    rows = len(pack_dataset(dataset, capacity, "bfd", {"batch_size": WINDOW}))
    return time.perf_counter() - start, rows


def summarize_packing(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    middle = lambda side, key, what: statistics.median(run["figures"][key][what] for run in lines[side])
    heads = ("lengths, capacity", "longer, drawn anew", "seconds", "padding", "TRL: seconds", "padding")
    table, bars = _head(heads), []
    for key, figures in lines["postrain"][0]["figures"].items():
        ours, theirs = (middle(side, key, "seconds") for side in lines)
        padding, of_trl = (middle(side, key, "padding") for side in lines)
        table.append(f"| {key} | {figures['longer']:.1%} | {ours:.2f} | {padding:.4%} | {theirs:.2f} | {of_trl:.3%} |")
        bars.append(Bar(f"{key}: seconds", ours, "<=", 1.0))
        bars.append(Bar("padding", padding, "<=", 0.0005, "{:.3%}"))
    return _tail(table, lines, f"{lines['postrain'][0]['count']:,} lengths, a window of {WINDOW:,}"), bars


def write_prepared(folder: str, count: int) -> None:
    pathlib.Path(folder, "template.jinja").write_text(data_workloads.TEMPLATE)
    records = data_workloads.LENGTHS["records"](count).clip(max=4096)
    data_workloads.write_conversations(pathlib.Path(folder, "records.jsonl"), records)
    short = data_workloads.LENGTHS["replies"](4 * count)
    data_workloads.write_conversations(pathlib.Path(folder, "short.jsonl"), short, turns=1)


def prepare_all(side: str, folder: str) -> dict:
    """Seconds, tokens and trained tokens of each file; on one core the seconds are those of its processor."""
    clock, processes = time.perf_counter, len(os.sched_getaffinity(0))
    if not side.endswith("all_cores"):  # before anything starts threads
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        clock, processes = time.process_time, 1
    return _prepare_here(folder, clock) if side.startswith("postrain") else _prepare_trl(folder, processes, clock)


def _prepare_here(folder: str, clock) -> dict:
    from postrain.data.rendering.tokenizer import load_tokenizer
    from postrain.hf.find_model import fetch_smollm2

    template = str(pathlib.Path(folder, "template.jinja"))
    figures = {}
    for name in PREPARED:  # a tokenizer each: none begins with the words of another file
        path = str(pathlib.Path(folder, f"{name}.jsonl"))
        figures[name] = _load(path, load_tokenizer(fetch_smollm2(), template), clock)
        figures[f"{name}, streamed"] = _stream(path, load_tokenizer(fetch_smollm2(), template), clock)
    return figures


def _load(path: str, tokenizer, clock) -> dict:
    from postrain.config import DataConfig, SourceConfig
    from postrain.data.batches.in_memory import MemoryBatches, load_examples

    config = DataConfig(train=(SourceConfig(path=path),), sequence_length=PREPARED_LENGTH)
    start = clock()
    example_set = load_examples(config.train, tokenizer, config)
    batches = MemoryBatches(example_set, config)
    for _ in range(batches.num_steps(1)):
        next(batches)
    seconds = clock() - start
    batches.close()
    total = example_set.report.total
    return {"seconds": seconds, "tokens": total.tokens, "trained": total.trained, "documents": total.documents}


def _stream(path: str, tokenizer, clock) -> dict:
    """One shard, once through the file; the last rows, which make no whole batch, are not counted."""
    from postrain.config import DataConfig, SourceConfig, StreamSection
    from postrain.data.batches.open import open_train_rows
    from postrain.errors import UserError

    source = SourceConfig(path=path, max_epochs=1)
    config = DataConfig(
        train=(source,), sequence_length=PREPARED_LENGTH, streaming=True, stream=StreamSection(shards=1)
    )
    start, tokens, trained = clock(), 0, 0
    batches = open_train_rows(tokenizer, config).batches
    try:
        while True:
            batch = next(batches)
            tokens += int((batch["segment_ids"] > 0).sum()) + int((batch["row_ids"] >= 0).sum())
            trained += int(batch["loss_mask"].sum())
    except UserError:  # the one epoch is over
        seconds = clock() - start
    batches.close()
    return {"seconds": seconds, "tokens": tokens, "trained": trained}


def _prepare_trl(folder: str, processes: int, clock) -> dict:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from postrain.hf.find_model import fetch_smollm2

    datasets.disable_caching()
    datasets.disable_progress_bars()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            start = clock()
            dataset = super()._prepare_dataset(*args, **kwargs)
            self.seconds = clock() - start
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm2())
    tokenizer.chat_template = pathlib.Path(folder, "template.jinja").read_text()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    figures = {}
    for name in PREPARED:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            packing=True,
            packing_strategy="bfd",
            max_length=PREPARED_LENGTH,
            assistant_only_loss=True,
            dataset_num_proc=processes if processes > 1 else None,
            disable_tqdm=True,
        )
        start, path = clock(), str(pathlib.Path(folder, f"{name}.jsonl"))
        cache = pathlib.Path(folder, f"cache-{os.getpid()}")
        rows = datasets.load_dataset("json", data_files=path, cache_dir=str(cache), split="train")
        read = clock() - start
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        trainer = Timed(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        packed = trainer.train_dataset.with_format("numpy")
        labels = [np.asarray(row) for row in packed["labels"]]
        trained = sum(int((row != -100).sum()) for row in labels)
        figures[name] = {"seconds": read + trainer.seconds, "tokens": sum(map(len, labels)), "trained": trained}
    return figures


def summarize_preparation(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    def middle(side, key):
        figures = [run["figures"][key] for run in lines[side]]
        return statistics.median(figure["tokens"] / figure["seconds"] for figure in figures)

    heads = ("tokens/s", "rows", "one core", "TRL, one core", "", "all cores", "TRL, all cores", "")
    table, bars = _head(heads), []
    for key, figure in lines["postrain"][0]["figures"].items():
        name, streamed, _ = key.partition(", streamed")
        theirs = lines["trl"][0]["figures"][name]
        # TRL keeps the line break after the last answer, which nothing is trained after.
        made = figure["tokens"] + figure.get("documents", 0), figure["trained"]
        if not streamed and made != (theirs["tokens"], theirs["trained"]):
            raise SystemExit(f"{name}: postrain makes {figure}, TRL {theirs}: these are not the same rows")
        one, trl, every = middle("postrain", key), middle("trl", name), middle("postrain_all_cores", key)
        trl_all = middle("trl_all_cores", name)
        table.append(
            f"| {key} | {figure['tokens']:,} tokens | {one:,.0f} | {trl:,.0f} | **{one / trl:.2f}x** | {every:,.0f} "
            f"| {trl_all:,.0f} | {every / trl_all:.2f}x |"
        )
        bars.append(Bar(f"{key}: tokens/s of a core over TRL's", one / trl, ">=", 3.0, "{:.2f}x"))
    return _tail(table, lines, f"{len(os.sched_getaffinity(0))} cores"), bars


def time_steps(side: str, folder: str, updates: int) -> dict:
    import sft

    from postrain.types import Batch

    figures = {}
    for name, (length, rows) in STEPS.items():
        lengths = np.sort(data_workloads.draw_fitting(name, SCALE * length, 4000)[0] // SCALE).clip(2)
        middles = ((np.arange(QUANTILES) + 0.5) * lengths.size / QUANTILES).astype(int)
        shown = {"packed": lengths, "padded": lengths[middles], "full": np.full(QUANTILES, length)}[side]
        rng, documents = np.random.default_rng(6), []
        for count in shown.tolist():  # the last three fifths are trained; the last token takes no slot
            documents.append((workloads.draw_ids(rng, count + 1), np.arange(count + 1) > 0.4 * count))
        packing, steps = ("best_fit", updates) if side == "packed" else ("none", QUANTILES // rows)
        step, state = sft.make_step(folder, steps, micro_batches=1)
        batches, _ = sft.make_batches(documents, length, rows, packing)
        seconds, useful, first = 0.0, 0, next(batches)
        batch = {key: value for key, value in first.items() if key != "row_ids"}
        state, _ = step(state, Batch(**batch))  # compiles
        for i in range(steps):
            batch = first if i == 0 else next(batches)
            start = time.perf_counter()
            state, metrics = step(state, Batch(**{k: v for k, v in batch.items() if k != "row_ids"}))
            float(metrics["train/loss"])
            seconds += time.perf_counter() - start
            useful += int((batch["segment_ids"] > 0).sum())
        slots = steps * rows * length
        padded_to_longest = _slots_padded_to_longest(lengths) / int(lengths.sum())
        share = lengths.mean() / length if side == "padded" else useful / slots  # of all, not of the quantiles
        figures[name] = {"slots_per_second": slots / seconds, "share": float(share), "to_longest": padded_to_longest}
        batches.close()
    return figures


def _slots_padded_to_longest(lengths: np.ndarray, rows: int = 8) -> int:
    """Slots where 8 documents at a time, in a shuffled order, are padded to their longest."""
    shuffled = np.random.default_rng(7).permutation(lengths)[: lengths.size // rows * rows].reshape(-1, rows)
    return int(rows * shuffled.max(axis=1).sum())


def summarize_step(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    heads = ("lengths", "useful: padded", "packed", "useful tokens/s: padded", "packed", "gain", "ceiling")
    heads += ("reached", "if padding cost what tokens do", "ceiling beside padding to the longest of 8")
    table, bars = _head(heads), []
    for name in STEPS:
        figures = {side: [run["figures"][name] for run in runs] for side, runs in lines.items()}
        share = {side: runs[0]["share"] for side, runs in figures.items()}
        rate = {side: statistics.median(r["slots_per_second"] for r in figures[side]) * share[side] for side in figures}
        gain, ceiling = rate["packed"] / rate["padded"], 1 / share["padded"]
        alike = rate["packed"] / rate["full"]  # the padded step's slots at the pace of full rows
        table.append(
            f"| {name} | {share['padded']:.1%} | {share['packed']:.1%} | {rate['padded']:,.0f} | {rate['packed']:,.0f} "
            f"| **{gain:.2f}x** | {ceiling:.2f}x | {gain / ceiling:.0%} | {alike:.0%} "
            f"| {figures['packed'][0]['to_longest']:.2f}x |"
        )
        bars.append(Bar(f"{name}: share of the ceiling", gain / ceiling, ">=", 0.9, "{:.0%}"))
    return _tail(table, lines, f"Lengths divided by {SCALE}"), bars


def stream_rows(folder: str, rows: int) -> dict:
    """Resident memory, in MiB, after each hundredth of the rows."""
    from postrain.config import DataConfig, SourceConfig
    from postrain.data.batches.open import open_train_rows
    from postrain.data.rendering.tokenizer import load_tokenizer
    from postrain.hf.find_model import fetch_smollm2

    source = SourceConfig(path=str(pathlib.Path(folder, "rows-*.jsonl")))
    config = DataConfig(train=(source,), sequence_length=1024, batch_size=32, streaming=True)
    batches = open_train_rows(load_tokenizer(fetch_smollm2()), config).batches
    seen, samples, start = 0, [], time.perf_counter()
    while seen < rows:
        seen += int((next(batches)["row_ids"] >= 0).sum())
        if seen * 100 >= rows * (len(samples) + 1):
            samples.append((seen, _resident()))
    seconds = time.perf_counter() - start
    batches.close()
    settled = np.array([sample for sample in samples if sample[0] > 0.05 * rows])
    slope = np.polyfit(settled[:, 0] / 1e6, settled[:, 1], 1)[0]
    return {
        "rows": seen,
        "rows_per_second": seen / seconds,
        "resident": float(np.median(settled[:, 1])),
        "spread": float(np.ptp(settled[:, 1])),
        "slope": float(slope),
    }


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def summarize_stream(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    figures = lines["stream"][0]["figures"]
    heads = ("rows", "rows/s", "resident, MiB", "largest less smallest after 5%", "fitted slope, MiB a million rows")
    table = _head(heads)
    table.append(
        f"| {figures['rows']:,} | {figures['rows_per_second']:,.0f} | {figures['resident']:.0f} "
        f"| {figures['spread']:.1f} | {figures['slope']:+.2f} |"
    )
    growth = figures["slope"] * figures["rows"] / 1e6 / figures["resident"]
    return _tail(table, lines, "8 shards"), [Bar("growth over all rows, of the memory", growth, "<=", 0.05, "{:.1%}")]


def _head(heads: tuple[str, ...]) -> list[str]:
    return [workloads.describe_machine(), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]


def _tail(table: list[str], lines: dict[str, list[dict]], what: str) -> str:
    runs = [run for of_side in lines.values() for run in of_side]
    others = max(run["others_cpu_share"] for run in runs)
    rounds = len(next(iter(lines.values())))
    note = f"{what}. Medians of {rounds} interleaved rounds; others took up to {others:.1%} of the CPU."
    return "\n".join([*table, "", f"{note} {describe_versions(lines)}"])


CASES = {
    "packing": (lambda a: pack_all(a.side, a.lengths), summarize_packing, lambda folder, a: None, "numpy trl"),
    "preparation": (
        lambda a: prepare_all(a.side, a.model),
        summarize_preparation,
        lambda folder, a: write_prepared(folder, a.conversations),
        "grain tokenizers transformers trl",
    ),
    "step": (
        lambda a: time_steps(a.side, a.model, a.updates),
        summarize_step,
        lambda folder, a: workloads.write_tiny_model(folder),
        "jax",
    ),
    "stream": (
        lambda a: stream_rows(a.model, a.rows),
        summarize_stream,
        lambda folder, a: data_workloads.write_short_rows(folder, a.rows),
        "grain tokenizers",
    ),
}


def main() -> None:
    parser = runner.make_parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="one of them alone")
    parser.add_argument("--lengths", type=int, default=1_000_000, help="of packing")
    parser.add_argument("--conversations", type=int, default=4800, help="of preparation; four times as many short ones")
    parser.add_argument("--updates", type=int, default=4, help="of the packed step")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the stream, one round")
    known, _ = parser.parse_known_args()
    if not known.case:
        codes = [subprocess.run([sys.executable, *sys.argv, "--case", case]).returncode for case in CASES]
        raise SystemExit(max(codes))
    measure, summarize, prepare, packages = CASES[known.case]

    def run_side(arguments) -> None:
        load = workloads.Load()
        figures, versions = measure(arguments), runner.find_versions(*packages.split())
        line = {"side": arguments.side, "figures": figures, "count": arguments.lengths, "versions": versions}
        workloads.emit(**line, others_cpu_share=load.share())

    parser.set_defaults(rounds=ROUNDS[known.case])
    sides = SIDES[known.case]
    runner.run_in_turns(parser, f"data_{known.case}", sides, run_side, summarize, lambda folder: prepare(folder, known))


if __name__ == "__main__":
    main()
