"""Differential privacy: of clients at the server (DP-FedAvg), of examples at the client (DP-SGD), what it costs, an audit."""
