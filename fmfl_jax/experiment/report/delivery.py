"""What bringing the base model to the clients costs by each way of delivery: one table, on one network."""

import dataclasses

import numpy as np

from fmfl_jax.experiment.network import rounds
from fmfl_jax.experiment.network.delivery import coded_stage_bits, make_delivery
from fmfl_jax.experiment.network.rounds import NetworkJob
from fmfl_jax.transport.size import tree_bits

VARIANTS = (
    (),
    ("arq",),
    ("fountain",),
    ("coded", "arq"),
    ("coded", "fountain"),
    ("coded", "progressive", "fountain"),
)


def delivery_rows(job: NetworkJob, params: dict, seed: int) -> list[dict]:
    """A row for each of VARIANTS: the network of `seed` after the base was delivered so. job: one with a delivery."""
    assert job.delivery is not None
    coded = coded_stage_bits(params)
    rows = []
    for methods in VARIANTS:
        delivery = None
        if methods:
            delivery = make_delivery(params, methods, forward_s=job.delivery.forward_s, coded=coded)
        base_bits = tree_bits(params) if delivery is None else delivery.bits
        state = rounds.start(dataclasses.replace(job, delivery=delivery, base_bits=base_bits), seed)
        rows.append(
            {
                "delivery": ",".join(methods) or "no fading",
                "base_bytes": base_bits / 8,
                "base_delivery_s": state.base_delivery_s,
                "base_unreached": int(np.sum(job.able & ~state.holds_base)),
            }
        )
    return rows


def delivery_table(rows: list[dict]) -> str:
    """The rows as text; shares are of the plain broadcast with ARQ."""
    plain = next(row["base_delivery_s"] for row in rows if row["delivery"] == "arq")
    lines = [f"{'delivery of the base':30}{'bytes':>16}{'seconds':>12}{'of arq':>9}{'unreached':>11}"]
    for row in rows:
        share = f"{row['base_delivery_s'] / plain:9.3f}" if plain else f"{'':9}"
        lines.append(
            f"{row['delivery']:30}{row['base_bytes']:16,.0f}{row['base_delivery_s']:12.3f}{share}"
            f"{row['base_unreached']:11}"
        )
    return "\n".join(lines)
