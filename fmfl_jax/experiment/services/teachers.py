"""What the server does after the clients' mean in each arm: distil a teacher, weigh clients, trust them by root data.

    FM           K steps on T^2 KL(p_FM || q) over the public pool                    (section III-B)
    FedDF        the same with the clients' ensemble as teacher                       (section III-A2; Lin et al. 2020)
    mixed        lambda FM + (1 - lambda) ensemble                                    (section III-A2)
    re-weighting by the accuracy on the pool with the FM's labels, with a floor       (section III-A2)
    FLTrust      the pool with the FM's labels as root data                           (Cao et al., NDSS 2021)

In rounds in which the answers are not there the server takes the plain mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax.experiment.services.config import Bits, Full, TopK
from fmfl_jax.fed.aggregators.distillation import distillation, reweighted_mean, reweighting
from fmfl_jax.fed.aggregators.robust_statistics import trust_scores, trusted_mean
from fmfl_jax.fed.core.reduce import gathered_mean
from fmfl_jax.fed.core.types import Aggregator
from fmfl_jax.models.classifiers import Model
from fmfl_jax.services import logit_codecs, teach
from fmfl_jax.services.ensemble import ensemble_logits, mixed_teacher
from fmfl_jax.services.reweight import accuracy_weights

_CLIP_RANGE = 10.0  # nats below the largest logit, of b-bit logits


class Sent(NamedTuple):
    """Answers as they arrive at the server: logits [N, K], or ids [N, k] and log_masses [N, k + 1]; and their bits."""

    logits: np.ndarray | None
    ids: np.ndarray | None
    log_masses: np.ndarray | None
    bits: int


def sent(log_probs: np.ndarray, form: Full | Bits | TopK) -> Sent:
    """encode and decode: what is trained on is what came over the link. log_probs: [N, K]."""
    n, num_classes = log_probs.shape
    if isinstance(form, TopK):
        codec = logit_codecs.top_k(num_classes, k=form.k, temperature=1.0)
        found = codec.decode(codec.encode(log_probs), n)
        return Sent(None, found.ids, found.log_masses, codec.payload_bits(n))
    if isinstance(form, Bits):
        codec = logit_codecs.uniform(num_classes, bits=form.bits, clip_range=_CLIP_RANGE)
    else:
        codec = logit_codecs.full(num_classes)
    return Sent(codec.decode(codec.encode(log_probs), n), None, None, codec.payload_bits(n))


def taught(
    model: Model, x: np.ndarray, answers: Sent, available: np.ndarray, *, learning_rate: float, num_steps: int
) -> Aggregator:
    """The FM's answers on pool rows x [N, L], distilled after every mean of a round in which they are there."""

    def inner(held) -> Aggregator:
        def loss(params, teacher, key):
            del teacher, key
            student = model.apply(params, held["x"])
            if answers.logits is None:
                found = teach.top_k_distillation_loss(student, held["ids"], held["log_masses"], temperature=1.0)
            else:
                found = teach.distillation_loss(student, held["logits"], temperature=1.0)
            return found.loss

        return distillation(loss, optax.sgd(learning_rate), num_steps=num_steps)

    held = {"logits": answers.logits, "ids": answers.ids, "log_masses": answers.log_masses}
    return while_served(inner, {"x": x} | {name: y for name, y in held.items() if y is not None}, available)


def taught_by_ensemble(
    model: Model,
    x: np.ndarray,
    fm_logits: np.ndarray | None,
    available: np.ndarray,
    *,
    fm_weight: float,
    learning_rate: float,
    num_steps: int,
) -> Aggregator:
    """FedDF on pool rows x [N, L]; with fm_logits [N, K] the mixture of both teachers."""

    def inner(held) -> Aggregator:
        def loss(params, teacher, key):
            del key
            return teach.distillation_loss(model.apply(params, held["x"]), teacher, temperature=1.0).loss

        def teacher(clients, weights):
            ensemble = ensemble_logits(jax.vmap(lambda params: model.apply(params, held["x"]))(clients), weights)
            if fm_logits is None:
                return ensemble
            return mixed_teacher(held["logits"], ensemble, fm_weight=fm_weight, temperature=1.0)

        return distillation(loss, optax.sgd(learning_rate), num_steps=num_steps, teach=teacher)

    held = {"x": x} | ({} if fm_logits is None else {"logits": fm_logits.astype(np.float32)})
    return while_served(inner, held, available)


def reweighted(
    model: Model, x: np.ndarray, labels: np.ndarray, available: np.ndarray, *, temperature: float, floor: float
) -> Aggregator:
    """Clients by the accuracy of their models on rows x [N, L] with the FM's labels int [N]."""

    def inner(held) -> Aggregator:
        def score(params):
            best = jnp.argmax(model.apply(params, held["x"]), axis=-1).astype(jnp.int32)
            return jnp.mean((best == held["labels"]).astype(jnp.float32))

        def weigh(weights, scores):
            return accuracy_weights(weights, scores, temperature=temperature, floor=floor)

        return reweighting(reweighted_mean(score, weigh))

    return while_served(inner, {"x": x, "labels": labels.astype(np.int32)}, available)


def trusting(
    model: Model, x: np.ndarray, labels: np.ndarray, available: np.ndarray, *, learning_rate: float, num_steps: int
) -> Aggregator:
    """FLTrust: the reference is the server's own num_steps of SGD on rows x with the FM's labels int [N]."""

    def inner(held) -> Aggregator:
        def loss(params):
            logits = model.apply(params, held["x"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, held["labels"]))

        def aggregate(gathered, state, key):
            del state, key
            params = gathered.params
            for _ in range(num_steps):
                params = jax.tree.map(lambda w, g: w - learning_rate * g, params, jax.grad(loss)(params))
            reference = jax.tree.map(jnp.subtract, gathered.params, params)
            trust = trust_scores(gathered.updates, gathered.weights, reference)
            return trusted_mean(gathered.updates, trust, reference), {}

        return Aggregator(aggregate=aggregate)

    return while_served(inner, {"x": x, "labels": labels.astype(np.int32)}, available)


class _Serving(NamedTuple):
    """The aggregator's state: rounds played, int32; whether the answers are there, bool [rounds]; the server's data. As
    a state and not as constants of the program, one compiled program serves all seeds and controls."""

    round: jax.Array
    available: jax.Array
    held: dict[str, jax.Array]


def while_served(
    make: Callable[[dict[str, jax.Array]], Aggregator], held: dict[str, np.ndarray], available: np.ndarray
) -> Aggregator:
    """The aggregator make(held) in the rounds in which the server has the FM's answers, bool [num_rounds]; else the
    plain mean."""

    def init(template):
        del template
        return _Serving(jnp.int32(0), jnp.asarray(available), jax.tree.map(jnp.asarray, held))

    def aggregate(gathered, state: _Serving, key):
        inner = make(state.held).aggregate
        assert inner is not None

        def served():
            return inner(gathered, (), key)

        def plain():
            names = jax.eval_shape(served)[1]
            return gathered_mean(gathered), {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in names.items()}

        return jax.lax.cond(state.available[state.round], served, plain)

    def postprocess(mean, state: _Serving, key):
        del key
        return mean.update, state._replace(round=state.round + 1), {}

    return Aggregator(init=init, aggregate=aggregate, postprocess=postprocess)
