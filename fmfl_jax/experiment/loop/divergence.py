"""Runs that go wrong: rounds whose clients were all dropped, and training that makes the model much worse.

A client whose update is not finite is dropped. A round in which that happens to everybody has no loss. A client with
far too high a learning rate may stay finite, so a loss is also compared with that of the model before training.
"""

import math

_WORSE_NATS = math.log(2)  # twice the perplexity of the model before training


def finite_metrics(metrics: dict) -> dict:
    """The metrics of a round as floats, without those that are not finite: means over nobody, and overflows."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def all_dropped(record: dict) -> bool:
    """Whether updates were delivered in this round and none of them counted."""
    return record.get("dropped_clients", 0) > 0 and record["counted_clients"] == 0


def dropped_line(record: dict) -> str:
    """What a round that dropped everybody says."""
    return (
        f"round {record['round']}: all {record['dropped_clients']:.0f} clients diverged: their updates are not finite "
        "and were dropped, the round has no loss"
    )


def mark_divergence(record: dict, first: dict) -> None:
    """Sets record["diverged"] where clients were dropped, or the loss in training or evaluation is far above that of
    `first`, the record before training."""
    before = _evaluation_loss(first)
    losses = [loss for loss in (record.get("loss"), _evaluation_loss(record)) if loss is not None]
    worse = before is not None and any(not loss <= before + _WORSE_NATS for loss in losses)
    if worse or record.get("dropped_clients", 0) > 0:
        record["diverged"] = True


def divergence_text(record: dict) -> str:
    """For the line of an evaluated round; "" where nothing diverged."""
    if not record.get("diverged"):
        return ""
    dropped = record.get("dropped_clients", 0)
    found = f"{dropped:.0f} dropped" if dropped else f"training loss {record['loss']:.3f}" if "loss" in record else ""
    return f", clients diverged ({found})" if found else ", clients diverged"


def require_some_round(history: list[dict]) -> None:
    """Raises ValueError where every round in which updates were delivered dropped them all."""
    delivered = [
        record for record in history[1:] if record.get("counted_clients", 0) + record.get("dropped_clients", 0)
    ]
    if delivered and all(map(all_dropped, delivered)):
        raise ValueError(
            f"every one of the {len(delivered)} rounds dropped all its clients: their updates are not finite, the "
            "model is as it was before training; try a lower learning rate"
        )


def _evaluation_loss(record: dict) -> float | None:
    """Nats: per token of a language model, per row of a classifier."""
    return record.get("nats_per_token", record.get("nll"))
