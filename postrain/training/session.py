"""Everything of a run that is known before its first row is read, and every refusal that needs no more than that."""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from markupsafe import Markup

from postrain.cluster import processes
from postrain.cluster.stopping import Watchdog
from postrain.config import Config, check_paths, format_config
from postrain.data.batches.in_memory import ExampleSet
from postrain.data.batches.row_filter import count
from postrain.data.documents import Rendered
from postrain.data.preview import render_tokens_html
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.hf.find_model import locate_model
from postrain.hf.folders import check_replaceable, clear_leftovers
from postrain.hf.peft.adapter import check_base
from postrain.models import grouped_dot
from postrain.models.attention.dispatch import check_backend, sees_prefixes, select_backend
from postrain.models.config import ModelConfig
from postrain.models.flops import format_formula
from postrain.models.lora import adapter_specs
from postrain.models.params import axes_of, frozen_specs, shapes_of
from postrain.report.metrics import check_trackers
from postrain.report.page import CHARTS, Chart, Table, write_report
from postrain.report.workdir import open_workdir, read_last_values
from postrain.sharding import (
    data_process,
    format_mesh,
    make_mesh,
    mesh_context,
    num_row_shards,
    undivided_dimensions,
)
from postrain.training.agreement import check_processes
from postrain.training.compatibility import check_resumable
from postrain.training.model import Model, count_params
from postrain.training.optimizer import format_schedule_warning

if TYPE_CHECKING:
    from postrain.training.program import Program
    from postrain.training.rows import Rows


FEW_UPDATES = 10  # a run of fewer has hardly left the warm-up of the learning rate


class ShownRow(NamedTuple):
    """A training row for the report: sequences, each with a line to stand above it, "" for none."""

    sequences: tuple[tuple[str, Rendered], ...]
    title: str = "A training row: the coloured tokens are trained"


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of a recipe, on this process.

    Attributes:
      workdir: locked for this run.
      model_folder: the Hugging Face folder of ``config.model.path``, on this machine.
      tokenizer: with the config's chat template and new tokens.
      watchdog: ends the run where one of its phases makes no progress.
      is_lead: whether this is the process that prints and writes.
    """

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    model_folder: pathlib.Path
    tokenizer: Tokenizer
    watchdog: Watchdog
    is_lead: bool
    started: float  # time.monotonic()

    def say(self, text: str) -> None:
        """Prints, on the first process."""
        if self.is_lead:
            print(text, flush=True)

    def print_summary(self, model: Model, program: "Program", rows: "Rows", held_out: ExampleSet | None = None) -> None:
        """Says what will run, and compiles its train step to say what memory it takes. Returns when all processes have.

        Raises UserError where the devices cannot run the attention back end that the config names.
        """
        self.say(format_summary(self.config, self.mesh, model, program.updates))
        chosen = choose_backend(model.config, self.mesh, self.config.data.share_prompts == "on")
        if checked := check_backend(dataclasses.replace(model.config, attention=chosen)):
            self.say(f"attention   {checked}")
        self.say(rows.summary + (f"\nheld out\n{held_out.report}" if held_out else ""))
        warnings = (
            format_few_rows(self.config, rows.rows_per_epoch, program.updates),
            format_overlong_warning(rows.lengths, model.config),
            format_schedule_warning(self.config.optimizer, program.updates),
        )
        for warning in filter(None, warnings):
            self.say(warning)
        # The memory of the compiled step on each device: state and batch, and temporaries.
        memory = program.compile().memory_analysis()
        if memory is None:
            self.say("memory      not reported by this back end")
        else:
            arguments = memory.argument_size_in_bytes
            temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.say(
                f"memory      {(arguments + temporary) / 2**30:.2f} GiB a device: {arguments / 2**30:.2f} for the "
                f"state and the batch, {temporary / 2**30:.2f} for the step"
            )
        processes.barrier()

    def write_report(
        self,
        rows: "Rows",
        held_out: ExampleSet | None = None,
        charts: Sequence[Chart] = CHARTS,
        tables: Sequence[Table] = (),
        shown: "ShownRow | None" = None,
    ) -> dict[str, float]:
        """Writes report.html with these charts and tables, and says where; returns the last value of every metric.

        ``shown``: the row to show; None: ``rows.sample``, with all its trained tokens.
        """
        step, metrics = read_last_values(self.workdir)
        notes = [*rows.notes, *(held_out.report.format_unread() if held_out else ())]
        consumed = rows.format_consumption(rows.join_states(processes.gather(rows.get_state())))
        if rows.example_set is not None:
            consumed = [*rows.example_set.report.format_use(), *consumed]
        shown = shown or ShownRow(tuple(("", sequence) for sequence in rows.sample.sequences))
        if self.is_lead:
            # What the figures depend on besides the config.
            packages = ("jax", "flax", "optax", "transformers", "numpy")
            environment = {
                "devices": format_mesh(self.mesh),
                "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
            }
            write_report(
                self.workdir,
                row_title=shown.title,
                row_html="".join(
                    (Markup("<p>{}</p>").format(line) if line else "") + render_tokens_html(sequence, self.tokenizer)
                    for line, sequence in shown.sequences
                ),
                consumed=[*consumed, *notes],
                environment=environment,
                charts=charts,
                tables=tables,
            )
        minutes = (time.monotonic() - self.started) / 60
        self.say(f"done after {minutes:.1f} min: {format_metrics(step, metrics)}")
        exported = "" if self.config.export.format == "none" else f", {self.workdir / 'export'} is the model"
        self.say(f"{self.workdir / 'report.html'} shows the run{exported}")
        return metrics


@contextlib.contextmanager
def open_session(config: Config, workdir: str | os.PathLike) -> Iterator[Session]:
    """The session of ``config.recipe`` in ``workdir``, which is locked, and watched for hangs, until the block ends.

    Raises UserError, before rows are rendered and weights are loaded: files of the config that are not there, processes
    that differ, a workdir in use, a mesh that the devices cannot make, an export that could not be written, a
    checkpoint in the workdir that this config cannot continue.
    """
    started, workdir = time.monotonic(), os.path.expanduser(workdir)
    check_paths(config)
    check_trackers(config.trackers)
    locate_model(config.model.path, weights=False)  # a wrong name on the hub is refused before the workdir is made
    if several := processes.current():
        check_processes(several, config, workdir)
    process = {"process": jax.process_index(), "processes": jax.process_count()}
    with open_workdir(workdir) as folder, Watchdog(folder, config.train.hang_timeout, **process) as watchdog:
        mesh = make_mesh(config.mesh)
        model_folder = locate_model(config.model.path)
        clear_leftovers(folder / "export")  # of a run that was killed while it exported
        if config.export.format != "none":
            check_replaceable(folder / "export")  # an export that cannot be written is refused now, not at the end
        if config.export.format == "adapter":
            check_base(model_folder)
        tokenizer = load_run_tokenizer(config, model_folder)
        check_resumable(folder / "checkpoints", config, tokenizer, model_folder)
        is_lead = jax.process_index() == 0
        yield Session(config, folder, mesh, model_folder, tokenizer, watchdog, is_lead, started)


# What a run says of itself


def format_summary(config: Config, mesh: Mesh, model: Model, total_steps: int) -> str:
    """Config, devices, parameters, the batch equation, the back ends; several lines."""
    trained, frozen = count_params(model)
    data, train = config.data, config.train
    _, hosts = data_process(mesh)  # processes that share rows count as one
    rows = data.batch_size // (train.micro_batches * hosts)
    slots = data.batch_size * data.sequence_length
    shards = num_row_shards(mesh)
    divided = f", its rows in {shards} parts on the devices" if shards > 1 else ""
    splits = f"{train.micro_batches} micro-batch{'es' * (train.micro_batches != 1)}"
    lines = [
        "config      what is not the default; config.json in the workdir has all keys",
        *(f"            {line}" for line in format_config(config).splitlines()),
        f"devices     {format_mesh(mesh)}, jax {jax.__version__}",
        *(f"            {line}" for line in format_undivided(model, mesh)),
        f"parameters  {trained:,} trained, {frozen:,} frozen ({trained / (trained + frozen):.2%} trained)",
        f"batch       {count(rows, 'row')} x {count(data.sequence_length, 'token')} x {splits} x "
        f"{count(hosts, 'host')} = {count(slots, 'token')} an update{divided}; {count(total_steps, 'update')}",
        *format_backends(model.config, mesh, prefixes=data.share_prompts == "on"),
        f"MFU         {format_formula(model.config, projects=model.projects)}",
    ]
    return "\n".join(lines)


def choose_backend(config: ModelConfig, mesh: Mesh, prefixes: bool = False) -> str:
    """The back end of attention. Raises UserError where the devices cannot run the one that is asked for.

    ``prefixes``: shared prompts are asked for, which not every back end computes.
    """
    with mesh_context(mesh):
        name = select_backend(config.attention)
        return "chunked" if prefixes and not sees_prefixes(name) else name


def format_backends(config: ModelConfig, mesh: Mesh, prefixes: bool = False) -> list[str]:
    """Lines naming the back ends of attention and the experts. Raises UserError as ``choose_backend``."""
    name = choose_backend(config, mesh, prefixes)
    with mesh_context(mesh):
        usual = select_backend(config.attention)
        instead = f" ({usual} computes no shared prompts)" if name != usual else ""
        lines = [f"attention   {name}, {config.compute_dtype}, remat {config.remat}{instead}"]
        if config.moe:
            lines.append(f"experts     {grouped_dot.select_backend(config.moe.backend)}")
    return lines


def format_undivided(model: Model, mesh: Mesh) -> list[str]:
    """Lines for the parameters that the mesh leaves whole although it names an axis for them."""
    specs = [frozen_specs(model.config), adapter_specs(model.config)]
    return [line for spec in specs for line in undivided_dimensions(axes_of(spec), mesh, shapes_of(spec))]


def format_few_rows(config: Config, rows_per_epoch: int, updates: int) -> str:
    """Lines where an update has more rows than an epoch, rows come again beyond the epochs, or the run is very short.

    ``rows_per_epoch``: packed rows of the first epoch, 0 where nobody knows. "" where there is nothing to say.
    """
    size, lines = config.data.batch_size, []
    taken, asked = updates * size, config.train.epochs * rows_per_epoch
    what = f"{count(updates, 'update')} of {count(size, 'row')}"
    if 0 < rows_per_epoch < size:
        lines.append(
            f"warning     {what} made of {count(rows_per_epoch, 'packed row')}: each comes about "
            f"{taken / rows_per_epoch:.3g} times: lower data.batch_size or data.sequence_length"
        )
    elif not config.train.steps and taken > asked > 0:
        lines.append(
            f"rows        {what} for train.epochs = {config.train.epochs:g} of {count(rows_per_epoch, 'packed row')}: "
            "the last is filled up with rows of a further epoch"
        )
    if updates < FEW_UPDATES:
        lines.append(
            f"warning     the whole run is {count(updates, 'update')}: unless it is a trial, raise "
            + ("train.steps" if config.train.steps else "train.epochs or lower data.batch_size or data.sequence_length")
        )
    return "\n".join(lines)


def format_overlong_warning(lengths: Sequence[int] | np.ndarray, config: ModelConfig) -> str:
    """A warning where documents are longer than the context length of pre-training, else ""."""
    longer = sum(int(length) > config.max_positions for length in lengths)
    if not longer:
        return ""
    return (
        f"warning     {longer:,} of {len(lengths):,} documents are longer than the {config.max_positions:,} positions "
        f"that the model was pre-trained for, the longest takes {max(lengths):,}: data.sequence_length would limit them"
    )


# Metrics from 0 to 1, by the ends of their names.
SHARES = ("accuracy", "accuracies", "agreement", "exact_match", "valid_json")


def format_metrics(step: int, metrics: Mapping[str, float]) -> str:
    """``step 40  eval/loss 0.1234  eval/exact_match 81.0%``: shares in per cent, the others as numbers."""
    shown = {name: float(value) for name, value in metrics.items() if name.startswith("eval/")}
    parts = [f"{name} {value:.1%}" if name.endswith(SHARES) else f"{name} {value:.4f}" for name, value in shown.items()]
    return "  ".join([f"step {step}", *parts])
