"""The configuration: one YAML file, read into frozen pydantic models that refuse unknown keys.

Every field's description is the comment that `dpo-ray config --template` prints.
"""

from dpo_ray.config.answers import EvaluationConfig, PairsConfig
from dpo_ray.config.base import Dtype, leaves
from dpo_ray.config.file import apply_overrides, load_config, parse_config, read_yaml, template, to_yaml
from dpo_ray.config.model import AdapterConfig, ModelConfig
from dpo_ray.config.objective import ObjectiveConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.resume import changed_keys
from dpo_ray.config.run import Config
from dpo_ray.config.training import TRACKER_NAMES, OptimizerConfig, RecoveryConfig, ScalingConfig, TrainConfig

__all__ = [
    "TRACKER_NAMES",
    "AdapterConfig",
    "Config",
    "Dtype",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairsConfig",
    "RecoveryConfig",
    "ReferenceConfig",
    "ScalingConfig",
    "TrainConfig",
    "apply_overrides",
    "changed_keys",
    "leaves",
    "load_config",
    "parse_config",
    "read_yaml",
    "template",
    "to_yaml",
]
