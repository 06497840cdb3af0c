"""Global pre-training on public text."""

import dataclasses

from fmfl_jax.finite import finite_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class PretrainConfig:
    """batch_size windows per step, over all devices; learning_rate is the peak."""

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.1
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "learning_rate", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"pre-training {name} must be positive, got {getattr(self, name)}")
