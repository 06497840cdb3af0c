"""The command privacy_audit as a user types it: finds noise that is missing, is calm where it is there, refuses."""

import re

import pytest

from fmfl_jax.fed.privacy.accounting import SampledGaussian, epsilon_pld
from tests.commands import run

SMALL = ["--num_clients=12", "--num_runs=2000", "--num_rounds=3"]


def number(pattern, printed):
    return float(re.search(pattern + r" ([0-9.]+)", printed)[1])


def test_noise_that_is_there_and_noise_that_is_only_claimed():
    allowed = epsilon_pld([(SampledGaussian(0.5, 1.5), 3)], 1e-3)
    status, printed, err = run("launch.privacy_audit", *SMALL, "--cohort_size=6", "--dp_noise=1.5")
    assert status == 0, err
    assert number("accountant: epsilon", printed) == pytest.approx(allowed, rel=1e-3)
    assert 0.1 * allowed < number("audit: epsilon is at least", printed) < allowed and "no defect found" in printed
    status, printed, err = run("launch.privacy_audit", *SMALL, "--dp_noise=0.3", "--claimed_noise=3")
    assert status == 1 and "a defect" in printed, err
    assert number("audit: epsilon is at least", printed) > number("accountant: epsilon", printed)
    status, printed, err = run("launch.privacy_audit", *SMALL, "--dp_epsilon=8", "--num_runs=100")
    assert status == 0 and "too few to find a defect" in printed, err
    assert number("accountant: epsilon", printed) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize(
    "flags, text",
    [
        ([], "--dp_noise and --dp_epsilon"),
        (["--dp_noise=nan"], "--dp_noise=nan: expected a finite number"),
        (["--dp_noise=1", "--cohort_size=30"], "--cohort_size is 30"),
        (["--dp_noise=1", "--num_runs=1000000000000"], "--num_runs=1000000000000 .* memory"),
    ],
)
def test_refusals(flags, text):
    status, printed, err = run("launch.privacy_audit", *flags)
    assert status == 2 and not printed and len(err.splitlines()) == 1 and re.search(text, err), err
