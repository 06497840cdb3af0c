"""Devices and processes: the axis that rounds are spread over, and how arrays get onto it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "clients"  # the SPMD axis that a round's psum runs over


def device_sharding(*, split: bool) -> NamedSharding:
    """Over all devices: an array's first axis split, or the whole array on each."""
    spec = PartitionSpec(AXIS) if split else PartitionSpec()
    return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), spec)


def process_devices() -> slice:
    """Which of all devices, in a layout [devices, ...], are this process's own."""
    start = jax.process_index() * jax.local_device_count()
    return slice(start, start + jax.local_device_count())


def spread(tree):
    """Host arrays laid out as [devices, ...], the same in every process, as the arguments of a compiled round: with one
    process they are taken as they are, with several each process puts its devices' part of one global array."""
    if jax.process_count() == 1:
        return tree
    sharding = device_sharding(split=True)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def replicate(tree, *, copy: bool = True):
    """Puts a tree on every device once, so that rounds do not copy it.

    copy: a device that holds an array already gets its own copy all the same, which may be donated. False spares the
    memory, for what is never donated: all devices of a CPU then share the one array.
    """
    sharding = device_sharding(split=False)

    def put(x):
        if jax.process_count() > 1:  # each process puts the same values on its own devices
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        if copy:
            return jax.device_put(jnp.array(x), sharding)
        # A CPU's devices take aligned host memory as it is; an array of one of them is copied to the others.
        return jax.device_put(np.asarray(x) if jax.default_backend() == "cpu" else x, sharding)

    return jax.tree.map(put, tree)


def local_copy(tree):
    """A replicated tree as this process's first device has it."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
