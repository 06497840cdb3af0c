"""The vmap rules of the W4A16 products: a batch of x over one weight folds into M, so the weight is read once."""

import jax
import jax.numpy as jnp


def _any(batched) -> bool:
    return any(jax.tree.leaves(batched))


def fold(impl):
    """custom_vmap of impl(x, *weights): a batch of x is more leading dims of x; batched weights run one by one."""
    fn = jax.custom_batching.custom_vmap(impl)

    @fn.def_vmap
    def rule(axis_size, in_batched, x, *weights):
        x_batched, *weights_batched = in_batched
        if not x_batched:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        if not _any(weights_batched):
            return fn(x, *weights), True

        def one(i):
            picked = [w[i] if b else w for w, b in zip(weights, weights_batched, strict=True)]
            return fn(x[i], *picked)

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return fn


def fold_epilogue(impl):
    """As `fold`, for impl(x, bias, residual, *weights): a batched bias joins the residual."""
    fn = jax.custom_batching.custom_vmap(impl)

    @fn.def_vmap
    def rule(axis_size, in_batched, x, bias, residual, *weights):
        x_batched, bias_batched, residual_batched, *weights_batched = in_batched
        if not x_batched:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        if residual is not None and not residual_batched:
            residual = jnp.broadcast_to(residual, (axis_size, *residual.shape))
        if _any(weights_batched):

            def one(i):
                picked = [w[i] if b else w for w, b in zip(weights, weights_batched, strict=True)]
                own_bias = bias[i] if bias_batched else bias
                return fn(x[i], own_bias, None if residual is None else residual[i], *picked)

            return jax.lax.map(one, jnp.arange(axis_size)), True
        if not _any(bias_batched):
            return fn(x, bias, residual, *weights), True
        y = fn(x, None, residual, *weights)
        return y + jnp.expand_dims(bias, tuple(range(1, y.ndim - 1))).astype(y.dtype), True

    return fn
