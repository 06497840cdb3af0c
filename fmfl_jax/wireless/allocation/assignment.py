"""Resource blocks to users: the assignment problem by shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987).

Chen et al. (IEEE TWC 2021, eq. 24) choose it so that the expected learning loss is least: the cost of a user on a block
is minus its data weight times its success probability, and 0 where delay or energy would be exceeded.
"""

import jax
import jax.numpy as jnp


def hungarian(cost):
    """Minimum-cost assignment of every row to a column of its own, O(R^2 C) as nested while loops.

    Args:
      cost: [R, C] finite floats with R <= C.

    Returns:
      [R] int32, the column of each row.

    Raises:
      ValueError: if there are more rows than columns (transpose it).
    """
    rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"cost must have at most as many rows as columns, got {rows} x {columns}")
    dtype = cost.dtype
    # Column 0 is a virtual one that holds the row being inserted; owner[j] is the row at column j, -1 if free.
    padded = jnp.concatenate([jnp.zeros((rows, 1), dtype), cost], axis=1)
    real = jnp.arange(columns + 1) > 0

    def insert(row, carry):
        u, v, owner = carry
        owner = owner.at[0].set(row)

        def searching(state):
            return owner_of(state) >= 0

        def owner_of(state):
            return owner[state[0]]

        def grow(state):
            column, distance, previous, used, u, v = state
            used = used.at[column].set(True)
            current = owner[column]
            reduced = padded[current] - u[current] - v
            closer = real & ~used & (reduced < distance)
            distance = jnp.where(closer, reduced, distance)
            previous = jnp.where(closer, column, previous)
            open_ = real & ~used
            best = jnp.argmin(jnp.where(open_, distance, jnp.inf)).astype(jnp.int32)
            delta = distance[best]
            # Dual update: rows of used columns rise, used columns fall, others come nearer.
            u = u.at[jnp.where(used, owner, rows)].add(delta, mode="drop")
            v = jnp.where(used, v - delta, v)
            distance = jnp.where(open_, distance - delta, distance)
            return best, distance, previous, used, u, v

        start = (
            jnp.int32(0),
            jnp.full((columns + 1,), jnp.inf, dtype),
            jnp.zeros((columns + 1,), jnp.int32),
            jnp.zeros((columns + 1,), bool),
            u,
            v,
        )
        column, _, previous, _, u, v = jax.lax.while_loop(searching, grow, start)

        def flip(state):
            column, owner = state
            before = previous[column]
            return before, owner.at[column].set(owner[before])

        _, owner = jax.lax.while_loop(lambda state: state[0] != 0, flip, (column, owner))
        return u, v, owner

    start = (jnp.zeros((rows,), dtype), jnp.zeros((columns + 1,), dtype), jnp.full((columns + 1,), -1, jnp.int32))
    _, _, owner = jax.lax.fori_loop(0, rows, insert, start)
    held = jnp.where(real & (owner >= 0), owner, rows)
    return jnp.zeros((rows,), jnp.int32).at[held].set(jnp.arange(columns + 1, dtype=jnp.int32) - 1, mode="drop")


def assign_blocks(utility, feasible):
    """At most one resource block for each user and one user for each block, the largest total utility.

    Args:
      utility: [C, B] >= 0, e.g. data weight x success probability of user c on block b.
      feasible: [C, B] bool; infeasible pairs are never assigned.

    Returns:
      [C] int32 block of each user, -1 for none. Users with utility 0 everywhere may stay without a block.
    """
    users, blocks = utility.shape
    cost = jnp.where(feasible, -utility, 0.0)
    if users <= blocks:
        block = hungarian(cost)
    else:
        user = hungarian(cost.T)  # [B]
        block = jnp.full((users,), -1, jnp.int32).at[user].set(jnp.arange(blocks, dtype=jnp.int32))
    at = jnp.take_along_axis(feasible, jnp.maximum(block, 0)[:, None], axis=1)[:, 0]
    return jnp.where((block >= 0) & at, block, -1)
