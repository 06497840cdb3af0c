"""How many clients attack and how many a defence is set to, of a whole federation: checked before anything runs."""

from typing import NamedTuple

from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.methods.aggregators import AGGREGATORS, Krum, MultiKrum, TrimmedMean
from fmfl_jax.experiment.methods.attacks import ATTACKS, NoAttack
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.fed.aggregators.robust_statistics import num_trimmed
from fmfl_jax.fed.shares import positive_count


class ClientCounts(NamedTuple):
    """attackers: of all clients; None without an attack. defended: of a whole cohort, how many are trimmed on either
    side, or Krum's f; None where the aggregator has no such number."""

    attackers: int | None
    defended: int | None

    def record(self) -> dict[str, int]:
        """{"attackers", "defended_clients"}, those that there are."""
        named = {"attackers": self.attackers, "defended_clients": self.defended}
        return {name: count for name, count in named.items() if count is not None}


def client_counts(fed: FederationConfig, *, num_clients: int, cohort_size: int) -> ClientCounts:
    """The counts. Raises ValueError, naming the field, where a share above 0 makes none."""
    attackers = defended = None
    if not isinstance(fed.attack, NoAttack):
        attackers = positive_count(fed.attack_fraction, num_clients, f"attack_fraction={fed.attack_fraction}")
    what = f"aggregator={name_of(fed.aggregator, AGGREGATORS)}"
    if isinstance(fed.aggregator, TrimmedMean):
        positive_count(fed.aggregator.fraction, cohort_size, f"{what} with cohort_size={cohort_size}")
        defended = num_trimmed(fed.aggregator.fraction, cohort_size)
        if fed.aggregator.fraction > 0 and defended == 0:
            raise ValueError(f"{what}: nothing of {cohort_size} clients can be trimmed")
    elif isinstance(fed.aggregator, Krum | MultiKrum):
        amount = fed.aggregator.malicious
        defended = int(amount)
        if amount < 1:
            defended = positive_count(amount, cohort_size, f"{what} with cohort_size={cohort_size}")
    return ClientCounts(attackers, defended)


def described(counts: ClientCounts, fed: FederationConfig, *, num_clients: int, cohort_size: int) -> list[str]:
    """The counts as lines for the screen; none where there is neither attack nor such a defence."""
    lines = []
    if counts.attackers is not None:
        lines.append(f"attack {name_of(fed.attack, ATTACKS)}: {counts.attackers} of {num_clients} clients attack")
    if counts.defended is not None:
        side = " on either side" if isinstance(fed.aggregator, TrimmedMean) else ""
        name = name_of(fed.aggregator, AGGREGATORS)
        lines.append(f"aggregator {name}: set to {counts.defended} of a cohort of {cohort_size}{side}")
        if isinstance(fed.aggregator, Krum | MultiKrum) and cohort_size < 2 * counts.defended + 3:
            lines[-1] += f", without Krum's guarantee, which needs {2 * counts.defended + 3}"
    return lines
