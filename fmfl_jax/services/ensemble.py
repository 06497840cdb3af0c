"""The teacher of the server's distillation (section III-A): the clients' ensemble, and its mixture with the FM.

FedDF (Lin et al., NeurIPS 2020): softmax of the *mean of the logits* of the client models, which is not the mean of
their softmaxes. With an FM the teacher is lambda p_FM + (1 - lambda) p_ensemble, on unlabelled or synthetic text; the
student is the averaged model, by `teach.distillation_loss`.

    >>> teacher = mixed_teacher(fm_logits, ensemble_logits(client_logits, weights), fm_weight=0.5, temperature=2.0)
    >>> teach.distillation_loss(student_logits, 2.0 * teacher, temperature=2.0)   # teacher: log-probabilities at T = 2
"""

import jax
import jax.numpy as jnp

from fmfl_jax.services.checks import positive, share
from fmfl_jax.services.teach import known_rows


def ensemble_logits(client_logits, weights=None) -> jax.Array:
    """[B, K] float32: the weighted mean of the clients' logits [C, B, K].

    weights: [C] >= 0, None is 1 each; a client of weight 0 (not delivered) has no part, nor has, in a row, one whose
    logits are not finite there. A row that no client knows is NaN, and the distillation leaves it out.
    """
    logits = jnp.asarray(client_logits)
    known = known_rows(logits)  # [C, B]
    given = jnp.ones(logits.shape[0], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    weight = jnp.where(known, given[:, None], 0.0)[..., None]  # [C, B, 1]
    total = jnp.sum(weight, axis=0)  # [B, 1]
    mean = jnp.sum(jnp.where(weight > 0, logits, jnp.zeros_like(logits)).astype(jnp.float32) * weight, axis=0)
    return jnp.where(total > 0, mean / jnp.where(total > 0, total, 1.0), jnp.nan)


def mixed_teacher(fm_logits, ensemble, *, fm_weight: float, temperature: float) -> jax.Array:
    """[B, K] float32 log-probabilities of fm_weight p_FM + (1 - fm_weight) p_ensemble, both softmaxes at this
    temperature; times the temperature they are logits for `teach.distillation_loss`.

    fm_logits, ensemble: [B, K]. A row that one of them does not know is the other's alone; NaN where neither knows it
    or the one that does has no weight.
    Raises ValueError for fm_weight outside [0, 1] and temperature <= 0.
    """
    share("fm_weight", fm_weight)
    positive(temperature=temperature)
    parts, weights = [], []
    for logits, weight in ((fm_logits, fm_weight), (ensemble, 1 - fm_weight)):
        known = known_rows(logits)[:, None]
        safe = jnp.where(known, logits, jnp.zeros_like(logits)).astype(jnp.float32)
        parts.append(jax.nn.log_softmax(safe / temperature))
        weights.append(jnp.where(known, jnp.float32(weight), 0.0))
    total = weights[0] + weights[1]  # [B, 1]
    logs = [jnp.log(weight / jnp.where(total > 0, total, 1.0)) for weight in weights]  # -inf where it has no part
    mixed = jnp.logaddexp(logs[0] + parts[0], logs[1] + parts[1])
    return jnp.where(total > 0, mixed, jnp.nan)
