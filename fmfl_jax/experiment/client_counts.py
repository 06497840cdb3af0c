"""How many clients attack and how many a defence is set to, of a whole federation: checked before anything runs."""

from typing import NamedTuple

from fmfl_jax.experiment.federation_config import FederationConfig, number_of, split_spec
from fmfl_jax.fed.robust import num_trimmed
from fmfl_jax.fed.shares import positive_count

DEFAULT_SHARE = 0.2  # of the defences that are told how many clients are malicious
_SHARED = ("trimmed_mean", "krum", "multi_krum")  # these


class ClientCounts(NamedTuple):
    """attackers: of all clients; None without an attack. defended: of a whole cohort, how many are trimmed on either
    side, or Krum's f; None where the aggregator has no such number."""

    attackers: int | None
    defended: int | None

    def record(self) -> dict:
        """{"attackers", "defended_clients"}, those that there are."""
        named = {"attackers": self.attackers, "defended_clients": self.defended}
        return {name: count for name, count in named.items() if count is not None}


def client_counts(fed: FederationConfig, *, num_clients: int, cohort_size: int) -> ClientCounts:
    """The counts. Raises ValueError, naming the flag, where a share above 0 makes none."""
    attackers = defended = None
    if fed.attack != "none":
        attackers = positive_count(fed.attack_fraction, num_clients, f"--attack_fraction={fed.attack_fraction}")
    if split_spec(fed.aggregator)[0] in _SHARED:
        amount = number_of("aggregator", fed.aggregator, DEFAULT_SHARE)
        defended = int(amount)
        if amount < 1:
            defended = positive_count(amount, cohort_size, f"--aggregator={fed.aggregator} with --cohort_size")
        if split_spec(fed.aggregator)[0] == "trimmed_mean" and 0 < amount < 0.5:
            defended = num_trimmed(amount, cohort_size)
            if defended == 0:
                raise ValueError(f"--aggregator={fed.aggregator}: nothing of {cohort_size} clients can be trimmed")
    return ClientCounts(attackers, defended)


def described(counts: ClientCounts, fed: FederationConfig, *, num_clients: int, cohort_size: int) -> list[str]:
    """The counts as lines for the screen; none where there is neither attack nor such a defence."""
    lines = []
    if counts.attackers is not None:
        lines.append(f"--attack={fed.attack}: {counts.attackers} of {num_clients} clients attack")
    if counts.defended is not None:
        side = " on either side" if fed.aggregator.startswith("trimmed_mean") else ""
        lines.append(f"--aggregator={fed.aggregator}: set to {counts.defended} of a cohort of {cohort_size}{side}")
        if "krum" in fed.aggregator and cohort_size < 2 * counts.defended + 3:
            lines[-1] += f", without Krum's guarantee, which needs {2 * counts.defended + 3}"
    return lines
