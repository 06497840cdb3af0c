"""HetLoRA over a network: what a client is planned to send follows its present rank, and a resumed run replays it."""

import numpy as np
import pytest

from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.methods.algorithms import HetLora
from fmfl_jax.wireless import presets
from tests.experiment.toys import (
    MODEL,
    assert_same_run,
    llama_data,
    llama_rounds,
    llama_run,
    llama_settings,
    make_toy_job,
    whole_and_resumed,
)

RANKS = (4, 2)  # dealt in turn
# One rank of q_proj [16, 16] in each of two layers, in float32.
BITS_OF_A_RANK = 2 * (MODEL.embed_dim + MODEL.num_heads * MODEL.head_dim) * 32


def test_planned_bits_follow_the_ranks_and_a_resumed_run_replays_them(tmp_path):
    """gamma 0.5 and a strong pull: whoever takes part loses ranks, so its next upload is planned shorter."""
    method = HetLora(gamma=0.5, regularization=5.0)
    config = llama_settings(FederationConfig(algorithm=method, lora_ranks=RANKS), rounds=llama_rounds(4))
    job = make_toy_job(presets.facts_20(num_clients=9))
    whole, resumed = whole_and_resumed(lambda folder: llama_run(config, folder, job=job), tmp_path, step=2)
    rank = {client: RANKS[client % 2] for client in range(9)}
    smaller = 0
    for record in whole.history[1:]:
        planned = np.asarray(record["planned_uplink_bits"])
        assert len(planned) == len(record["clients"]) == 4 and record["participation"] == 1.0
        np.testing.assert_array_equal(planned % BITS_OF_A_RANK, 0)
        # The radio carried what was planned, the base model apart.
        assert record["uplink_bytes"] == planned.sum() / 8
        now = planned // BITS_OF_A_RANK
        for client, ranks in zip(record["clients"], now.tolist()):
            assert ranks in (rank[client], max(1, rank[client] // 2))  # pruned in the last round that it was in
            smaller += ranks < RANKS[client % 2]
            rank[client] = ranks
        # What is sent is of the rank after this round's pruning: never more than was planned. Means by examples.
        sizes = llama_data().sizes[record["clients"]]
        assert record["payload_bits"] <= np.average(planned, weights=sizes) * (1 + 1e-6)
        assert record["rank"] * BITS_OF_A_RANK == pytest.approx(record["payload_bits"], rel=1e-6)
    assert smaller >= 2  # uploads that were planned shorter than at the start
    assert_same_run(whole, resumed)
    np.testing.assert_array_equal(whole.outcome.uplink_bits, resumed.outcome.uplink_bits)
    np.testing.assert_array_equal(whole.outcome.finish_s, resumed.outcome.finish_s)
