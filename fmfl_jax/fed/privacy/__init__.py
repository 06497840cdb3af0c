"""Differential privacy: of clients at the server (DP-FedAvg), of examples at the client (DP-SGD); cost; audit."""
