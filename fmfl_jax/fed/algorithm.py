"""The shape of a federated algorithm: two pure functions, in the manner of FedJAX (Ro et al., 2021)."""

import dataclasses
from typing import Any, Callable, NamedTuple

import jax

AXIS = "clients"  # the SPMD axis that a round's psum runs over


class Cohort(NamedTuple):
    """The clients of one round that one device trains; every leaf has the leading axis C.

    client_ids: int32 [C]; they seed each client's randomness, so the order of clients changes nothing.
    weights: float32 [C], number of examples, or 0 for padding and for clients that are not heard.
    batches: pytree of arrays [C, S, ...], one slice per local step.
    normalizers: float32 [C], what each client adds to the denominator of the mean; None: its weight. With
      inverse-probability weights it is the number of examples, of a client that was not heard too.
    client_states: pytree of arrays [C, ...] that the clients keep between rounds, for algorithms that have any.
    """

    client_ids: jax.Array
    weights: jax.Array
    batches: Any
    normalizers: Any = None
    client_states: Any = ()


class ServerState(NamedTuple):
    """What the server keeps between rounds; all of it is checkpointed.

    params: trainable parameters, {name: array}. opt_state: the server optimizer's. round: int32 scalar, rounds done.
    seed: uint32 scalar; with `round` it determines all randomness and the position in every client's data.
    """

    params: Any
    opt_state: Any
    round: jax.Array
    seed: jax.Array


@dataclasses.dataclass(frozen=True)
class FederatedAlgorithm:
    """init(params, seed) -> ServerState; round(state, frozen, cohort) -> (ServerState, metrics).

    `round` is one SPMD function: it runs on every device with that device's clients and reduces over the axis
    "clients", so it must be called under pmap or shard_map with that axis (see fed/sharding.py). metrics is a dict of
    float32 scalars, equal on all devices.

    init_client(params) -> what one client keeps between rounds; None where clients keep nothing. Where they do, `round`
    reads cohort.client_states and returns the new ones, [C, ...], as a third value.
    """

    init: Callable
    round: Callable
    init_client: Callable | None = None
