"""When a client can compute that starts with the layers it has: start_l = max(arrival_l, end_{l-1})."""

import numpy as np


def first_answer_s(stage_bits, rate_bps, compute_s):
    """(seconds until the last stage is computed while the later ones still arrive, seconds when nothing starts before
    all is there). stage_bits: [L] in the order of delivery; rate_bps: scalar or [...]; compute_s: [L] or [..., L]."""
    arrival = np.cumsum(np.asarray(stage_bits, np.float64)) / np.asarray(rate_bps, np.float64)[..., None]
    compute = np.broadcast_to(np.asarray(compute_s, np.float64), arrival.shape)
    end = np.zeros(arrival.shape[:-1])
    for layer in range(arrival.shape[-1]):
        end = np.maximum(arrival[..., layer], end) + compute[..., layer]
    return end, arrival[..., -1] + compute.sum(-1)
