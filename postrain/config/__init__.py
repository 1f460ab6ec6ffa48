"""The config of a run: its keys (``schema``), checked and made immutable (``check``), from files (``load``)."""

from postrain.config.check import HOW_TO_GET_A_MODEL, check_model_path, check_paths, format_config, resolve, to_dict
from postrain.config.load import load_config
from postrain.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraSection,
    MeshConfig,
    MixtureSection,
    ModelSection,
    NewTokensSection,
    OptimizerConfig,
    PhaseConfig,
    RouterSection,
    SourceConfig,
    SpikeSection,
    StreamSection,
    TrackersConfig,
)

__all__ = [
    "HOW_TO_GET_A_MODEL",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoraSection",
    "MeshConfig",
    "MixtureSection",
    "ModelSection",
    "NewTokensSection",
    "OptimizerConfig",
    "PhaseConfig",
    "RouterSection",
    "SourceConfig",
    "SpikeSection",
    "StreamSection",
    "TrackersConfig",
    "check_model_path",
    "check_paths",
    "format_config",
    "load_config",
    "resolve",
    "to_dict",
]
