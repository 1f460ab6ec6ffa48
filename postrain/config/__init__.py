"""The config of a run: its keys (``schema``), checked and made immutable (``check``), from files (``load``)."""

from postrain.config.check import check_model_path, check_paths, format_config, is_hub_name, resolve, to_dict
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
    "is_hub_name",
    "load_config",
    "resolve",
    "to_dict",
]
