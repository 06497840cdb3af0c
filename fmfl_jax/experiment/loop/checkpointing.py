"""Training state on disk, by orbax: written whole or not at all, the last two kept."""

import pathlib
from typing import cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from fmfl_jax.parallel import replicate


def open_checkpoints(directory: str | pathlib.Path) -> ocp.CheckpointManager:
    """The checkpoints under `directory` (made if missing). Use as a context manager: closing waits for writes."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)


def save_state(checkpoints: ocp.CheckpointManager, step: int, state) -> None:
    """Writes a pytree of arrays as checkpoint `step`. What was there before stays until the new one is whole."""
    if jax.process_count() > 1:
        # pmap gives each process an array of its own devices; orbax wants the one array of all.
        state = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else replicate(np.asarray(x)), state)
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_state[State](checkpoints: ocp.CheckpointManager, like: State) -> tuple[int, State] | None:
    """The newest checkpoint as (step, state), or None where there is none.

    like: a pytree of arrays; the restored state has its structure, shapes, dtypes and devices (numpy arrays come back
    as such). Raises ValueError when the checkpoint holds something else.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None

    def target_of(x):
        return x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    target = jax.tree.map(target_of, like)
    return step, cast(State, checkpoints.restore(step, args=ocp.args.StandardRestore(target)))
