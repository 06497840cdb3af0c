"""How long a federated run is, and how much of it a round."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """A federated run. cohort_size clients are drawn in each round; each takes local_steps of batch_size windows.

    eval_every, checkpoint_every: in rounds; the last round is always evaluated and kept. clients_per_pass: how many
    clients of a device train side by side; None is all. wait_for_rounds: each round is waited for, and timed by itself;
    else the device is kept busy with the next ones, and times are means from one evaluation to the next.
    """

    num_rounds: int
    cohort_size: int
    local_steps: int
    batch_size: int
    seed: int = 0
    clients_per_pass: int | None = None
    eval_every: int = 1
    checkpoint_every: int = 5
    wait_for_rounds: bool = True

    def __post_init__(self):
        for name in ("num_rounds", "cohort_size", "local_steps", "batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clients_per_pass is not None and self.clients_per_pass < 1:
            raise ValueError(f"clients_per_pass must be at least 1, got {self.clients_per_pass}")
