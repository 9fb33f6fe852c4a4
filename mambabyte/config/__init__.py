"""What a run is given: model, training, named presets; and where files and numbers come from.

Nothing here imports torch.
"""

from mambabyte.config.model import MIXERS, ModelConfig
from mambabyte.config.presets import PRESETS, Preset, get_preset
from mambabyte.config.training import TrainConfig

__all__ = ["MIXERS", "PRESETS", "ModelConfig", "Preset", "TrainConfig", "get_preset"]
