"""Secure aggregation: the server learns the sum of the clients' updates and nothing else of them.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017:

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   mod 2^m

fixed_point.py: updates as integers (JAX). aggregator.py: the same as an `Aggregator` of a round. client.py, server.py:
the protocol; protocol.py runs all of it in one process. wire.py, crypto.py, shamir.py: what these are made of (NumPy).
"""
