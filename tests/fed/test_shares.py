"""One rule for shares of clients, against exact decimal arithmetic."""

import decimal

import numpy as np
import pytest
from fmfl_jax.experiment.federation_config import FederationConfig
from fmfl_jax.fed.robust import num_trimmed

from fmfl_jax.experiment.config.client_counts import client_counts
from fmfl_jax.fed.attacks import malicious_clients
from fmfl_jax.fed.shares import nearest_count


def test_the_nearest_whole_number_halves_up():
    for hundredths in range(101):
        for count in range(0, 201):
            exact = decimal.Decimal(hundredths) / 100 * count
            expected = int(exact.quantize(decimal.Decimal(1), decimal.ROUND_HALF_UP))
            assert nearest_count(hundredths / 100, count) == expected, (hundredths, count)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45])
def test_attackers_and_defences_agree(share):
    for n in range(3, 60):
        fed = FederationConfig(attack="sign_flip", attack_fraction=share, aggregator=f"multi_krum:{share}")
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
        (dict(attack="sign_flip", attack_fraction=0.2), "--attack_fraction=0.2: a share of 0.2 of 2 clients is none"),
        (dict(aggregator="trimmed_mean:0.2"), "--aggregator=trimmed_mean:0.2"),
        (dict(aggregator="krum:0.1"), "--aggregator=krum:0.1"),
    ],
)
def test_a_share_that_becomes_none_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        client_counts(FederationConfig(**settings), num_clients=2, cohort_size=2)


def test_a_share_of_zero_is_nobody():
    fed = FederationConfig(attack="sign_flip", attack_fraction=0.0, aggregator="trimmed_mean:0")
    assert client_counts(fed, num_clients=2, cohort_size=2) == (0, 0)
