"""Who pays whom: a vendor prices its foundation model, sells bandwidth by auction, and buys clients' work on a budget.

python examples/selling_the_service.py
"""

import numpy as np

from fmfl_jax.services.incentives.contracts import choose, rents_usd, screening_menu
from fmfl_jax.services.incentives.procurement import buy
from fmfl_jax.services.incentives.stackelberg import price_service
from fmfl_jax.services.incentives.vcg import greedy, vcg


def main() -> dict[str, float]:
    rng = np.random.default_rng(0)
    willing = rng.lognormal(1.0, 1.0, size=12)  # USD per unit of ln(1 + tokens)
    offer = price_service(willing, unit_cost_usd=0.5)
    buyers = int(np.sum(offer.amounts > 0))
    print(f"the service at {offer.price_usd:.2f} USD a unit: {buyers} of 12 buy, profit {offer.profit_usd:.2f} USD")

    values, mhz = rng.uniform(1, 10, 12), rng.uniform(0.5, 4, 12)
    exact, quick = vcg(values, mhz, capacity=10.0), greedy(values, mhz, capacity=10.0)
    print(
        f"10 MHz to {exact.winners.sum()} bidders: welfare {exact.welfare_usd:.2f}, paid {exact.payments_usd.sum():.2f}"
    )
    print(f"  by greed {quick.welfare_usd:.2f}, paid {quick.payments_usd.sum():.2f}; no false bid gains in either")

    costs, examples = rng.lognormal(0.0, 0.5, size=12), rng.integers(10, 100, 12)
    bought = buy(costs, examples, budget_usd=6.0)
    spent, cost = bought.payments_usd.sum(), costs[bought.winners].sum()
    print(f"work of {bought.winners.sum()} clients for {spent:.2f} of 6 USD, which costs them {cost:.2f}")

    theta = [1.0, 2.0, 4.0]
    menu = screening_menu(theta, [0.3, 0.4, 0.3])
    chosen = choose(menu, 1 / np.asarray(theta))
    for i, rent in zip(chosen, rents_usd(menu, theta)):
        print(
            f"a client that takes offer {i} works {menu.work[i]:.2f} for {menu.reward_usd[i]:.2f} USD, keeps {rent:.2f}"
        )
    return {
        "profit": offer.profit_usd,
        "welfare": exact.welfare_usd,
        "greedy": quick.welfare_usd,
        "spent": float(spent),
    }


if __name__ == "__main__":
    main()
