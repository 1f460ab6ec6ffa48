"""One file per method, each a loop that reads from top to bottom. ``train`` runs the one that a config names,
``plan`` compiles its step for hardware that need not be there."""

import dataclasses
import importlib
import os
from typing import Any

import jax

from postrain.cluster.processes import current
from postrain.cluster.watchdog import Watchdog
from postrain.config import Config, check_model_path, check_paths, resolve
from postrain.config.load import load_config
from postrain.plan.plan import PlanReport, make_plan
from postrain.training.agreement import check_processes
from postrain.training.workdir import open_workdir


def train(config: Any, workdir: str | os.PathLike) -> dict[str, float]:
    """Runs ``config.recipe`` in ``workdir``; goes on from there when it holds a checkpoint of the same run.

    Args:
        config: a Config, a ConfigDict or dict of its keys, or the ``path.py:arg`` of a config file.
        workdir: the folder that everything of the run is written to.

    Returns:
        The last value of every metric, e.g. ``{"train/loss": 0.8, "eval/loss": 0.9, ...}``.

    Raises:
        UserError: a mistake in the config, the data, the model folder or the workdir; another run in the workdir.
    """
    if isinstance(config, str):
        config = load_config(config)
    else:  # a Config may have been changed by hand
        config = resolve(dataclasses.asdict(config) if isinstance(config, Config) else config)
    check_paths(config)
    if processes := current():
        check_processes(processes, config, workdir)
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    with open_workdir(workdir) as folder:
        where = {"process": jax.process_index(), "processes": jax.process_count()}
        with Watchdog(folder, config.train.hang_timeout, **where) as watch:
            return recipe.train(config, folder, watch)


def plan(config: Config, target: str) -> PlanReport:
    """What a step of ``config`` needs of ``target``, such as "v5e:4x4", "h100:1x8" or "cpu:8"; nothing is run.

    Best in a process of its own: devices of the CPU are set up before JAX starts, and JAX's cache of compiled programs
    is switched off. Raises UserError: a config, mesh or batch that cannot be, a target that does not exist, a
    compiler that is not installed.
    """
    check_model_path(config.model.path)
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    return make_plan(config, target, recipe.make_step)
