"""How many clients a share of them is: one rule for attackers, for what a defence is set to, and for selection."""

import math

_ROUNDING = 1e-9  # 0.29 * 50 is 14.499999999999998 in floating point


def nearest_count(share: float, num_clients: int) -> int:
    """The whole number nearest to share * num_clients, halves up."""
    return math.floor(share * num_clients + 0.5 + _ROUNDING)


def positive_count(share: float, num_clients: int, what: str) -> int:
    """`nearest_count`, and an error where it makes nothing of something.

    Raises ValueError, which begins with `what`, where the share is above 0 and the count is 0.
    """
    count = nearest_count(share, num_clients)
    if share > 0 and count == 0:
        raise ValueError(
            f"{what}: a share of {share:g} of {num_clients} clients is none, the nearest whole number is 0"
        )
    return count
