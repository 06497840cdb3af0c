"""Next-token cross-entropy of a Llama."""

import jax
import jax.numpy as jnp

from fmfl_jax.models.llama import Llama


def token_nll(model: Llama, windows, *, dropout_key=None, remat=False):
    """float32 [B, T]: -log p(windows[b, t+1] | windows[b, :t+1]) in nats, of windows int32 [B, T+1]."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = model.logits(model.hidden(inputs, dropout_key=dropout_key, remat=remat))  # [B, T, V]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, T]
    return jax.nn.logsumexp(logits, axis=-1) - picked
