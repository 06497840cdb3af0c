"""What the server does after the clients' mean in each arm: distil a teacher, weigh clients, trust them by root data.

    FM           K steps on T^2 KL(p_FM || q) over the public pool                    (section III-B)
    FedDF        the same with the clients' ensemble as teacher                       (section III-A2; Lin et al. 2020)
    mixed        lambda FM + (1 - lambda) ensemble                                    (section III-A2)
    re-weighting by the accuracy on the pool with the FM's labels, with a floor       (section III-A2)
    FLTrust      the pool with the FM's labels as root data                           (Cao et al., NDSS 2021)

The pool's hashed rows and the answers are constants of the round's program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax.experiment.services.config import Bits, Full, TopK
from fmfl_jax.fed.aggregators.distillation import Teach, distillation, reweighted_mean, reweighting
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


def taught(model: Model, x: np.ndarray, answers: Sent, *, learning_rate: float, num_steps: int) -> Aggregator:
    """The FM's answers on pool rows x [N, L], distilled after every mean."""
    rows = jnp.asarray(x)

    def loss(params, teacher, key):
        del teacher, key
        student = model.apply(params, rows)
        if answers.logits is None:
            assert answers.ids is not None and answers.log_masses is not None
            ids, masses = jnp.asarray(answers.ids), jnp.asarray(answers.log_masses)
            return teach.top_k_distillation_loss(student, ids, masses, temperature=1.0).loss
        return teach.distillation_loss(student, jnp.asarray(answers.logits), temperature=1.0).loss

    return distillation(loss, optax.sgd(learning_rate), num_steps=num_steps)


def taught_by_ensemble(
    model: Model,
    x: np.ndarray,
    fm_logits: np.ndarray | None,
    *,
    fm_weight: float,
    learning_rate: float,
    num_steps: int,
) -> Aggregator:
    """FedDF on pool rows x [N, L]; with fm_logits [N, K] the mixture of both teachers."""
    rows = jnp.asarray(x)

    def loss(params, teacher, key):
        del key
        return teach.distillation_loss(model.apply(params, rows), teacher, temperature=1.0).loss

    def ensemble(clients, weights):
        logits = jax.vmap(lambda params: model.apply(params, rows))(clients)
        return ensemble_logits(logits, weights)

    def mixed(clients, weights):
        both = jnp.asarray(fm_logits, jnp.float32)
        return mixed_teacher(both, ensemble(clients, weights), fm_weight=fm_weight, temperature=1.0)

    teacher: Teach = ensemble if fm_logits is None else mixed
    return distillation(loss, optax.sgd(learning_rate), num_steps=num_steps, teach=teacher)


def reweighted(model: Model, x: np.ndarray, labels: np.ndarray, *, temperature: float, floor: float) -> Aggregator:
    """Clients by the accuracy of their models on rows x [N, L] with the FM's labels int [N]."""
    rows, truth = jnp.asarray(x), jnp.asarray(labels, jnp.int32)

    def score(params):
        return jnp.mean((jnp.argmax(model.apply(params, rows), axis=-1) == truth).astype(jnp.float32))

    def weigh(weights, scores):
        return accuracy_weights(weights, scores, temperature=temperature, floor=floor)

    return reweighting(reweighted_mean(score, weigh))


def trusting(model: Model, x: np.ndarray, labels: np.ndarray, *, learning_rate: float, num_steps: int) -> Aggregator:
    """FLTrust: the reference is the server's own num_steps of SGD on rows x with the FM's labels int [N]."""
    rows, truth = jnp.asarray(x), jnp.asarray(labels, jnp.int32)

    def loss(params):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.apply(params, rows), truth))

    def aggregate(gathered, state, key):
        del state, key
        params = gathered.params
        for _ in range(num_steps):
            params = jax.tree.map(lambda w, g: w - learning_rate * g, params, jax.grad(loss)(params))
        reference = jax.tree.map(jnp.subtract, gathered.params, params)
        trust = trust_scores(gathered.updates, gathered.weights, reference)
        return trusted_mean(gathered.updates, trust, reference), {}

    return Aggregator(aggregate=aggregate)


def while_served(inner: Aggregator, available: np.ndarray) -> Aggregator:
    """`inner` in the rounds in which the server has the FM's answers, bool [num_rounds]; else the plain mean. The
    state is the number of rounds played."""
    assert inner.aggregate is not None
    aggregate_inner, there = inner.aggregate, jnp.asarray(available)

    def aggregate(gathered, state, key):
        def served():
            return aggregate_inner(gathered, (), key)

        def plain():
            names = jax.eval_shape(served)[1]
            return gathered_mean(gathered), {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in names.items()}

        return jax.lax.cond(there[state], served, plain)

    def postprocess(mean, state, key):
        del key
        return mean.update, state + 1, {}

    return Aggregator(init=lambda template: jnp.int32(0), aggregate=aggregate, postprocess=postprocess)
