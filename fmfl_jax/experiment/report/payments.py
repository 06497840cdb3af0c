"""What a round's record says of payments, in words."""


def payment_text(record: dict) -> str:
    """Of one evaluated round, to follow its other figures; nothing without a market."""
    if "least_ask_usd" in record:
        return f", clients ask {record['least_ask_usd']:.3g} to {record['most_ask_usd']:.3g} USD for a round"
    if "paid_usd" not in record:
        return ""
    kept = f"{record['client_surplus_usd']:.3g} above their costs"
    return f", {record['recruited']} clients paid {record['paid_usd']:.3g} USD ({kept})"


def payments_line(row: dict) -> str:
    """Of a whole run."""
    return (
        f"paid {row['total_paid_usd']:.3g} USD to {row['recruited_per_round']:.1f} clients a round, "
        f"{row['total_client_surplus_usd']:.3g} above their costs"
    )
