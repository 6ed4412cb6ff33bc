"""Direct Preference Optimization on Ray: exact, fast, fault-tolerant, plain to read.

from dpo_ray import Config, train

result = train(Config(name="mine", storage_path="runs", model={"path": "model"}, data={"train": ["pairs.jsonl"]}))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_ray.config import Config
    from dpo_ray.orchestration.trainer import Result, train

__all__ = ["Config", "Result", "train"]


def __getattr__(name: str) -> Any:
    # Torch and Ray take seconds to import, and many tasks of a run need neither.
    if name == "Config":
        from dpo_ray.config import Config

        return Config
    if name in ("Result", "train"):
        from dpo_ray.orchestration import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'dpo_ray' has no attribute {name!r}")
