"""Classifier calibration after the rounds (section III-A2): FedAvg's last layer fitted anew, features as they are.

    CCVR            virtual features from the clients' class means and covariances     (Luo et al., NeurIPS 2021)
    labelled text   the FM's surest texts of the public pool, equally many a class: nothing of the clients is sent
    own texts       those that the FM wrote and scored, where it writes
    shuffled        the labelled text with its labels shuffled                          (control)
    labelled rows   the few public rows with true labels that decay is chosen by        (control)
    all rows        the clients' rows in one place                                      (bound)

The decay of every refit is the best on the few public rows with labels.
"""

from collections.abc import Callable

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import Rows
from fmfl_jax.experiment.services import students
from fmfl_jax.experiment.services.arm import Inputs
from fmfl_jax.experiment.services.data import hashed, hashed_rows
from fmfl_jax.models.classifiers import Model
from fmfl_jax.services import augment, ccvr
from fmfl_jax.services.checks import distributions

_DECAYS = (1e-3, 1e-2, 1e-1, 1.0)


def calibrated(inputs: Inputs, params, test: Rows, worst: Callable[[dict], float]) -> list[dict]:
    """A row a kind of calibration of the trained params. worst(params): the accuracy of the worst client. radio_bytes:
    what the clients sent for it."""
    model, data, num_classes = inputs.model, inputs.data, inputs.data.histograms.shape[1]
    train, parts = data.task.train, np.split(data.task.shards.rows, data.task.shards.starts[1:-1])
    features = lambda x: np.asarray(students.features(model, params, x), np.float64)
    public = hashed_rows(inputs.public, inputs.config.data)
    own = [ccvr.class_statistics(features(train.x[rows]), train.y[rows], num_classes) for rows in parts]
    rng = streams.host_rng(streams.SERVICE_CALIBRATION, inputs.seed)
    virtual = ccvr.draw_features(ccvr.merge_statistics(own), inputs.config.num_virtual, rng=rng)
    x, labels = _labelled_text(inputs)
    sets = {
        "calibrated, CCVR": virtual,
        "calibrated, FM-labelled text": (features(x), labels),
        "calibrated, FM-labelled text, labels shuffled": (features(x), rng.permutation(labels)),
    }
    if inputs.generated is not None and inputs.fm_generated is not None:
        written = features(hashed(inputs.generated.texts, inputs.config.data))
        sets["calibrated, the FM's own texts"] = written, inputs.fm_generated.log_probs.argmax(axis=1)
    sets["calibrated, the public labelled rows"] = features(public.x), public.y
    sets["calibrated, all clients' rows"] = features(train.x[data.task.shards.rows]), train.y[data.task.shards.rows]
    found = []
    for name, (x, y) in sets.items():
        new = refitted(model, params, x, y, num_classes, public)
        row = {"arm": name, "seed": inputs.seed, "accuracy": students.accuracy(model, new, test)}
        sent = sum(map(ccvr.payload_bits, own)) / 8 if name == "calibrated, CCVR" else None
        found.append(row | {"worst_client": worst(new), "radio_bytes": sent})
    return found


def refitted(model: Model, params, features, labels, num_classes: int, public: Rows) -> dict:
    """params with the last layer of a softmax regression on features [n, D], at the decay that is best on public rows
    (the largest among equals)."""
    candidates = []
    for decay in sorted(_DECAYS, reverse=True):
        w, b = ccvr.refit_last_layer(features, labels, num_classes, decay=decay)
        candidates.append(dict(params) | {"w": w.astype(np.float32), "b": b.astype(np.float32)})
    return max(candidates, key=lambda new: students.accuracy(model, new, public))


def _labelled_text(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(x [n, L], labels int [n]): the FM's surest texts, half of what each class would have of an even pool."""
    p = distributions("probabilities", np.exp(inputs.fm_pool.log_probs))
    num_classes = p.shape[1]
    wanted = augment.fixed_size_requests(num_classes, per_class=max(1, len(p) // (2 * num_classes)))
    served = augment.retrieve(p, wanted)
    return inputs.data.pool_rows.x[served.rows], served.labels
