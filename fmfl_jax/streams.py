"""Every random stream of the project, one named constant each: no two may draw the same numbers by accident.

On the host a stream is the first word of a numpy seed, host_rng(STREAM, seed, round, client, ...): numpy pads seeds
with zeros, so that without the first word (seed, a) would equal (seed, a, 0). On the device a stream is folded into a
key beside numbers that stay below it: rounds at the run's key (below 2**22), client numbers at the round's and steps at
the client's (below 2**30).
"""

import numpy as np

# First words of seeds on the host.
SHUFFLE = 1  # + seed, client, epoch: the order of a client's windows
COHORT = 2  # + seed, round
POISSON_COHORT = 3  # + seed, round
POISSON_WINDOWS = 4  # + seed, client, round: DP-SGD's batches
DEADLINE_COHORT = 5  # + seed, round
OORT_COHORT = 6  # + seed, round
ASYNC_START = 7  # + seed, number of starts: who starts next at an asynchronous server
ASYNC_DURATION = 8  # + seed, number of starts: how long it takes
CLIENT_DURATION = 9  # + seed: every client's mean duration where there is no network
HOLD_OUT = 10  # + seed, client: the windows that a client's own model is evaluated on
AUDIT = 11  # + seed, number of runs, number of clients: the privacy audit's population
PRETRAIN = 12  # + seed, step: the windows of a pre-training step
CALIBRATION = 13  # + seed: AWQ's windows
NOTES = 14  # + seed: the built-in labelled texts
SAMPLE = 15  # + seed: which texts of a file are scored
SERVICE_TEXTS = 20  # + seed, 0 or 1: which texts are tested on; which are the clients', the pool's, to tune on
SERVICE_CLIENTS = 21  # + seed: the clients' mixtures of labels
SERVICE_CONTROLS = 22  # + seed, kind of control: shuffled answers
SERVICE_OUTAGES = 23  # + seed: the way to the foundation model, round by round
SERVICE_EVALUATION = 24  # + seed, 0 or 1: draws of labelled rows; students of the over-fitting alarm
SERVICE_CALIBRATION = 25  # + seed: CCVR's virtual features
SERVICE_SILOS = 26  # + seed, silo: the order of a silo's rows in the tuning of its teacher
RECRUITS = 30  # + seed, round: who is taken on and paid
REHEARSALS = 32  # + seed, round: the cohorts by which clients expect what a round takes
CONTRIBUTIONS = 31  # + seed, round: the permutations of Shapley values
SERVING = 40  # + seed: the requests of a serving simulation
SERVING_PREDICTOR = 41  # + seed: its predictor of lengths
MALICIOUS = 101  # + seed: who attacks
VOCABULARY = 102  # + seed: the cipher of attackers' text
ANALOG_FADE = 0x616974  # + seed, round: over-the-air computation

# Folded into the run's key beside round numbers.
NETWORK_PLACES = 0x616972
NETWORK_ROUND = 0x616973  # then the round
NETWORK_REHEARSAL = 0x616976  # then the round
NETWORK_BASE = 0x616975  # the delivery of the base model before the first round

# Folded into a round's key beside client numbers.
SERVER = 2**31 - 3  # the aggregator's noise, the server's own update
ATTACK = 2**31 - 4
AGGREGATE = 2**31 - 5

# Folded into a client's key of a round beside the numbers of local steps.
PERSONAL = 2**30  # the steps on what is not shared
CODEC = 2**31 - 1
FRESH_FACTORS = 2**31 - 5  # FLoRA's


def host_rng(stream: int, *words: int) -> np.random.Generator:
    """The numpy generator of a stream; words: seed, round, client and so on, in the order that stands beside it."""
    return np.random.default_rng((stream, *words))
