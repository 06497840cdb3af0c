"""Who pays whom (section V of the paper): prices, auctions, contracts, and what each client contributed."""
