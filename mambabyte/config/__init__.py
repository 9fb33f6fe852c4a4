"""What a run is given: model, training, named presets; and where files and numbers come from.

Nothing here imports torch.
"""

from mambabyte.config.mixers import SPECS, MixerSpec
from mambabyte.config.model import ModelConfig
from mambabyte.config.presets import PRESETS, Preset, get_preset
from mambabyte.config.training import TrainConfig

__all__ = ["PRESETS", "SPECS", "MixerSpec", "ModelConfig", "Preset", "TrainConfig", "get_preset"]
