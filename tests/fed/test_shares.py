"""One rule for shares of clients, against exact decimal arithmetic."""

import decimal

from fmfl_jax.fed.shares import nearest_count


def test_the_nearest_whole_number_halves_up():
    for hundredths in range(101):
        for count in range(0, 201):
            exact = decimal.Decimal(hundredths) / 100 * count
            expected = int(exact.quantize(decimal.Decimal(1), decimal.ROUND_HALF_UP))
            assert nearest_count(hundredths / 100, count) == expected, (hundredths, count)
