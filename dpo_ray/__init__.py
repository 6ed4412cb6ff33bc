"""Direct Preference Optimization on Ray: exact, fast, fault-tolerant, plain to read.

from dpo_ray import Config, train

result = train(Config(name="mine", storage_path="runs", model={"path": "model"}, data={"train": ["pairs.jsonl"]}))
"""

from typing import TYPE_CHECKING, Any

from dpo_ray.config import Config

if TYPE_CHECKING:
    from dpo_ray.orchestration.trainer import Result, train

__all__ = ["Config", "Result", "train"]


def __getattr__(name: str) -> Any:
    # Ray and torch load only when training is asked for.
    if name in ("Result", "train"):
        from dpo_ray.orchestration import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'dpo_ray' has no attribute {name!r}")
