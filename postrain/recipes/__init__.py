"""One file per method, each a loop that reads from top to bottom. ``train`` runs the one that a config names."""

import importlib
import os
from typing import Any

from postrain.compute.workdir import open_workdir
from postrain.config import Config, check_paths, resolve, to_dict
from postrain.config_file import load_config


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
        config = resolve(to_dict(config) if isinstance(config, Config) else config)
    check_paths(config)
    recipe = importlib.import_module(f"postrain.recipes.{config.recipe}")
    with open_workdir(workdir) as folder:
        return recipe.train(config, folder)
