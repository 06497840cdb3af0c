"""The server's optimizer."""

import dataclasses

import optax

from fmfl_jax.fed.algorithms import server_optimizers
from fmfl_jax.finite import finite_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class ServerConfig:
    """optimizer of the pseudo-gradient: "sgd" (with learning rate 1 and momentum 0: FedAvg; with momentum: FedAvgM),
    "adam", "yogi" and "adagrad" of optax, or "fedadam", "fedyogi" and "fedadagrad" of Reddi et al., Algorithm 2."""

    optimizer: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self):
        if self.optimizer not in ("sgd", *_SERVER_OPTIMIZERS):
            raise ValueError(f"server_optimizer={self.optimizer}: expected sgd, {', '.join(_SERVER_OPTIMIZERS)}")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"server momentum belongs to sgd, got optimizer {self.optimizer!r}")
        if self.learning_rate <= 0 or not 0 <= self.momentum < 1:
            raise ValueError("the server needs a learning rate above 0 and a momentum in [0, 1)")

    def make(self) -> optax.GradientTransformation:
        """The optax transformation."""
        if self.optimizer == "sgd":
            return optax.sgd(self.learning_rate, self.momentum or None)
        return _SERVER_OPTIMIZERS[self.optimizer](self.learning_rate)

    @property
    def is_plain(self) -> bool:
        """Whether the server takes the mean as it is."""
        return (self.optimizer, self.learning_rate, self.momentum) == ("sgd", 1.0, 0.0)


_SERVER_OPTIMIZERS = {
    "adam": optax.adam,
    "yogi": optax.yogi,
    "adagrad": optax.adagrad,
    "fedadam": server_optimizers.fed_adam,
    "fedyogi": server_optimizers.fed_yogi,
    "fedadagrad": server_optimizers.fed_adagrad,
}
