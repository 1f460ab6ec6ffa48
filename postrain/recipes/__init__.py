"""One file a method, each a loop that reads from top to bottom. ``train`` runs the one that a config names, ``plan``
compiles its step for hardware that need not be there."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

from postrain.config import Config, check_config, check_model_path, resolve
from postrain.config.load import load_config
from postrain.data.documents import AS_RENDERED, Document, Preparation
from postrain.plan.plan import PlanReport, make_plan
from postrain.training.rows import check_documents


def train(config: Any, workdir: str | os.PathLike) -> dict[str, float]:
    """Runs ``config.recipe`` in ``workdir``; continues there when it holds a checkpoint of the same run.

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
    elif isinstance(config, Config):
        check_config(config)  # it may have been changed by hand
    else:
        config = resolve(config)
    return importlib.import_module(f"postrain.recipes.{config.recipe}").train(config, workdir)


def find_preparation(config: Config) -> Preparation:
    """What the config's recipe makes of rendered rows: its ``prepare(config, mesh=None)``, where it has one."""
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    return recipe.prepare(config) if hasattr(recipe, "prepare") else AS_RENDERED


def describe_rows(config: Config, documents: Sequence[Document]) -> list[str]:
    """Lines that the config's recipe has about rows before it trains on them. Raises UserError as it would."""
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    if hasattr(recipe, "make_check"):
        check_documents(documents, recipe.make_check(config))
    return recipe.describe_rows(config, documents).splitlines() if hasattr(recipe, "describe_rows") else []


def plan(config: Config, target: str) -> PlanReport:
    """What a step of ``config`` needs of ``target``, such as "v5e:4x4", "h100:1x8" or "cpu:8"; nothing is run.

    Best in a process of its own: devices of the CPU are set up before JAX starts, and JAX's cache of compiled programs
    is switched off. Raises UserError: a config, mesh or batch that cannot be, a target that does not exist, a
    compiler that is not installed.
    """
    check_model_path(config.model.path)
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    return make_plan(config, target, recipe.make_program)
