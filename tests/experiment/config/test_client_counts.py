"""What shares of clients make of attackers and defences: the same counts, and never none of some."""

import numpy as np
import pytest

from fmfl_jax.experiment.config.client_counts import client_counts
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.methods.aggregators import Krum, MultiKrum, TrimmedMean
from fmfl_jax.experiment.methods.attacks import SignFlip
from fmfl_jax.fed.aggregators.robust_statistics import num_trimmed
from fmfl_jax.fed.attacks import malicious_clients


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45])
def test_attackers_and_defences_agree(share):
    for n in range(3, 60):
        fed = FederationConfig(attack=SignFlip(), attack_fraction=share, aggregator=MultiKrum(share))
        try:
            counts = client_counts(fed, num_clients=n, cohort_size=n)
        except ValueError:
            assert share * n < 0.5
            continue
        assert counts.attackers == counts.defended == np.sum(malicious_clients(n, share, 0)) >= 1
        assert num_trimmed(share, n) == min(counts.attackers, (n - 1) // 2)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(attack=SignFlip(), attack_fraction=0.2), "attack_fraction=0.2: a share of 0.2 of 2 clients is none"),
        (dict(aggregator=TrimmedMean(0.2)), "aggregator=trimmed_mean"),
        (dict(aggregator=Krum(0.1)), "aggregator=krum"),
    ],
)
def test_a_share_that_becomes_none_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        client_counts(FederationConfig(**settings), num_clients=2, cohort_size=2)


def test_a_share_of_zero_is_nobody():
    fed = FederationConfig(attack=SignFlip(), attack_fraction=0.0, aggregator=TrimmedMean(0.0))
    assert client_counts(fed, num_clients=2, cohort_size=2) == (0, 0)
