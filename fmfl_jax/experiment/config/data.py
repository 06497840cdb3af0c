"""Texts and how they are dealt to the clients."""

import dataclasses

from fmfl_jax.finite import finite_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where text comes from. train and eval are files or folders; both None: the text that ships with CPython, one half
    for pre-training, the other for the clients, a tenth of it held out. calib: the server's own text; None: train, or
    the first half.

    max_eval_windows bounds the evaluation text (None: all of it).
    """

    train: str | None = None
    eval: str | None = None
    calib: str | None = None
    seq_len: int = 128
    max_eval_windows: int | None = None
    calib_windows: int = 128

    def __post_init__(self):
        if (self.train is None) != (self.eval is None):
            raise ValueError("train_text and eval_text must be given together")
        for name in ("seq_len", "calib_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class PartitionConfig:
    """How the training windows are dealt: "random" (the paper's), "dirichlet" over documents with concentration alpha,
    "document" (whole documents), or "quantity" (log-normal sizes with `skew`)."""

    kind: str = "random"
    num_clients: int = 20
    alpha: float = 0.5
    skew: float = 1.0

    def __post_init__(self):
        if self.kind not in ("random", "dirichlet", "document", "quantity"):
            raise ValueError(f"partition must be random, dirichlet, document or quantity, got {self.kind!r}")
        if self.num_clients < 1:
            raise ValueError(f"num_clients must be at least 1, got {self.num_clients}")
