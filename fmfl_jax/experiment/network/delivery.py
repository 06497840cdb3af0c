"""The base model on its way to the clients: coded, repaired by a fountain, computed with while it arrives."""

import dataclasses
import functools

import jax
import numpy as np

from fmfl_jax.experiment.delivery.sources import stages_of
from fmfl_jax.transport.size import tree_bits
from fmfl_jax.transport.weights import broadcast, coders
from fmfl_jax.transport.weights.progressive import first_answer_s
from fmfl_jax.wireless import multicast
from fmfl_jax.wireless.network import Network, NetworkState

# Packets of a block that random combinations are taken of: 250 of 1 KiB are a chunk of the container.
BLOCK_PACKETS = 250
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseDelivery:
    """How the base is broadcast. stage_bits: int [stages], what is sent, in the order of computing. stage_share: float
    [stages], of the forward pass's work. forward_s: float [C], of one step of each client. fountain: losses are
    repaired by random combinations, not by sending again. progressive: a client computes its first forward pass while
    layers arrive."""

    stage_bits: np.ndarray
    stage_share: np.ndarray
    forward_s: np.ndarray
    fountain: bool
    progressive: bool

    def __post_init__(self):
        if len(self.stage_bits) != len(self.stage_share):
            raise ValueError(f"{len(self.stage_bits)} stages of bits, {len(self.stage_share)} of work")

    @property
    def bits(self) -> int:
        """Of the whole."""
        return int(np.sum(self.stage_bits))


def make_delivery(
    params: dict, methods: tuple[str, ...], *, forward_s: np.ndarray, coded: np.ndarray | None = None
) -> BaseDelivery:
    """The delivery of `params` by `methods` (config/network.py). coded: of `coded_stage_bits`, where it is known."""
    stages = stages_of(params)
    plain = np.bincount(list(stages.values()), [tree_bits(params[name]) for name in stages]).astype(np.int64)
    work = plain.astype(float)
    work[0] = 0.0  # an embedding is looked up
    if not any(name.startswith("lm_head") for name in params):
        work[-1] += plain[0]  # and is the head too
    return BaseDelivery(
        stage_bits=plain if "coded" not in methods else coded_stage_bits(params) if coded is None else coded,
        stage_share=work / work.sum(),
        forward_s=forward_s,
        fountain="fountain" in methods,
        progressive="progressive" in methods,
    )


def coded_stage_bits(params: dict) -> np.ndarray:
    """int64 [stages]: the parameters as the container's coders have them. Params of shapes only count as they are."""
    stages = stages_of(params)
    bits = np.zeros(max(stages.values()) + 1, np.int64)
    for name, stage in stages.items():
        for leaf in jax.tree.leaves(params[name]):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                bits[stage] += tree_bits(leaf)
                continue
            array = np.ascontiguousarray(jax.device_get(leaf))
            _, data = coders.encode(
                array.reshape(-1).view(np.uint8).data, _DTYPES.get(array.dtype.name, array.dtype.name)
            )
            bits[stage] += 8 * len(data)
    return bits


def delivery_s(network: Network, state: NetworkState, base: BaseDelivery, chosen: np.ndarray) -> np.ndarray:
    """Seconds [C] until each chosen client has the base; inf where out of reach, 0 for the others.

    Of a progressive delivery without the part of the first forward pass that was done meanwhile: the round that follows
    counts it.
    """
    sends = (
        functools.partial(broadcast.fountain_sends, num_chunks=BLOCK_PACKETS) if base.fountain else broadcast.arq_sends
    )
    seconds = multicast.broadcast_s(network, state, float(base.bits), chosen, sends)
    if base.progressive:
        there = np.isfinite(seconds) & (seconds > 0)
        rate_bps = base.bits / np.where(there, seconds, 1.0)
        early, late = first_answer_s(base.stage_bits, rate_bps, base.forward_s[:, None] * base.stage_share)
        seconds = np.where(there, seconds - (late - early), seconds)
    return seconds
