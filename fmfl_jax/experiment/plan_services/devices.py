"""A scenario's models over several devices: split by layers, or every layer cut (tensor parallel)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from fmfl_jax.experiment.config.scenario import Scenario
from fmfl_jax.services import placement, split, tensor_parallel


class SplitPlan(NamedTuple):
    """layers_at: devices of the layers in both objectives; None: no split fits."""

    model: str
    devices: list[str]
    tokens: int
    latency: split.Split | None
    stage: split.Split | None
    alone_s: float | None
    reason: str


class TensorParallelPlan(NamedTuple):
    """token_s [counts], all_reduce_s of them in a token."""

    name: str
    model: str
    place: str
    num_devices: list[int]
    token_s: list[float]
    all_reduce_s: list[float]


def split_plans(scenario: Scenario) -> list[SplitPlan]:
    """The scenario's splits, for a request alone and for a full pipeline."""
    found = []
    for row in scenario.splits:
        model, places = scenario.model(row.model), [scenario.place(name) for name in row.devices]
        layers, n = model.num_layers, len(places)
        layer = dataclasses.replace(
            model, num_params=model.num_params / layers, weight_bytes=model.weight_bytes / layers
        )
        seconds = [placement.prefill_s(place, layer, row.tokens) for place in places]
        transfer = 8 * model.activation_bytes * row.tokens / row.link_bps + row.link_latency_s
        cost = split.ChainCost(
            np.tile(seconds, (layers, 1)),
            np.full(layers, layer.weight_bytes),
            np.asarray([place.memory_bytes for place in places]),
            transfer * (1 - np.eye(n)),
        )
        alone = layers * seconds[0] if model.weight_bytes <= places[0].memory_bytes else None
        try:
            both = [split.split_layers(cost, objective=objective) for objective in split.OBJECTIVES]
            found.append(SplitPlan(row.model, row.devices, row.tokens, both[0], both[1], alone, ""))
        except ValueError as error:
            found.append(SplitPlan(row.model, row.devices, row.tokens, None, None, alone, str(error)))
    return found


def tensor_parallel_plans(scenario: Scenario) -> list[TensorParallelPlan]:
    """The scenario's models over equal devices: a token at no context."""
    found = []
    for row in scenario.tensor_parallel:
        model, place = scenario.model(row.model), scenario.place(row.place)
        one = placement.decode_s(place, model, 1, 1)
        link = tensor_parallel.Interconnect(rate_bps=row.link_bps, latency_s=row.link_latency_s)
        reduces, tokens = [], []
        for n in row.num_devices:
            reduces.append(2 * model.num_layers * tensor_parallel.ring_all_reduce_s(n, model.activation_bytes, link))
            tokens.append(
                tensor_parallel.token_s(
                    one_device_s=one,
                    num_devices=n,
                    num_layers=model.num_layers,
                    activation_bytes=model.activation_bytes,
                    link=link,
                )
            )
        found.append(TensorParallelPlan(row.name, row.model, row.place, row.num_devices, tokens, reduces))
    return found
