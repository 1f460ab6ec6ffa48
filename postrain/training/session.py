"""Everything of a run that is known before its first row is read, and every refusal that needs no more than that."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from postrain.cluster import processes
from postrain.cluster.watchdog import Watchdog
from postrain.config import Config, check_paths
from postrain.data.batches.in_memory import ExampleSet
from postrain.data.preview import render_tokens_html
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.hf.find_model import locate_model
from postrain.hf.folders import check_replaceable, clear_leftovers
from postrain.hf.peft.adapter import check_base
from postrain.models.attention.dispatch import check_backend
from postrain.report.charts import CHARTS, Chart
from postrain.report.page import write_report
from postrain.report.workdir import last_step, last_values, open_workdir
from postrain.sharding import make_mesh
from postrain.training.agreement import check_processes
from postrain.training.compatibility import check_resumable
from postrain.training.model import Model
from postrain.training.optimizer import format_schedule_warning
from postrain.training.program import Program
from postrain.training.summary import (
    environment_facts,
    format_memory,
    format_metrics,
    format_overlong_warning,
    format_summary,
)

if TYPE_CHECKING:
    from postrain.training.rows import Rows


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

    def print_summary(self, model: Model, program: Program, rows: "Rows", held_out: ExampleSet | None = None) -> None:
        """Says what will run, and compiles its train step to say what memory it takes. Returns when all processes have.

        Raises UserError where the devices cannot run the attention back end that the config names.
        """
        self.say(format_summary(self.config, self.mesh, model, program.updates))
        if checked := check_backend(model.config):
            self.say(f"attention   {checked}")
        self.say(rows.summary + (f"\nheld out\n{held_out.report}" if held_out else ""))
        warnings = (
            format_overlong_warning(rows.lengths, model.config),
            format_schedule_warning(self.config.optimizer, program.updates),
        )
        for warning in filter(None, warnings):
            self.say(warning)
        self.say(format_memory(program.compile()))
        processes.barrier()

    def write_report(self, rows: "Rows", charts: Sequence[Chart] = CHARTS) -> dict[str, float]:
        """Writes report.html with these charts and says where it is; returns the last value of every metric."""
        metrics = last_values(self.workdir)
        consumed = rows.format_consumption(rows.join_states(processes.gather(rows.get_state())))
        if self.is_lead:
            write_report(
                self.workdir,
                row_html="".join(render_tokens_html(one, self.tokenizer) for one in rows.sample.sequences),
                consumed=consumed,
                environment=environment_facts(self.mesh),
                charts=charts,
            )
        minutes = (time.monotonic() - self.started) / 60
        self.say(f"done after {minutes:.1f} min: {format_metrics(last_step(self.workdir), metrics)}")
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
    started = time.monotonic()
    check_paths(config)
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
