"""Resource blocks to users: the assignment problem, by optax's Hungarian method.

Chen et al. (IEEE TWC 2021, eq. 24) choose it so that the expected learning loss is least: the cost of a user on a block
is minus its data weight times its success probability, and 0 where delay or energy would be exceeded.
"""

import jax.numpy as jnp
import optax


def assign_blocks(utility, feasible):
    """At most one resource block for each user and one user for each block, the largest total utility.

    Args:
      utility: [C, B] >= 0, e.g. data weight x success probability of user c on block b.
      feasible: [C, B] bool; infeasible pairs are never assigned.

    Returns:
      [C] int32 block of each user, -1 for none. Users with utility 0 everywhere may stay without a block.
    """
    user, block = optax.assignment.hungarian_algorithm(jnp.where(feasible, -utility, 0.0))  # [min(C, B)] each
    granted = jnp.where(feasible[user, block], block.astype(jnp.int32), -1)
    return jnp.full((utility.shape[0],), -1, jnp.int32).at[user].set(granted)
