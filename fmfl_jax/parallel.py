"""Devices and processes: the axis that rounds are spread over, and how arrays get onto it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "clients"  # the SPMD axis that a round's psum runs over
MODEL_AXIS = "model"  # the one that a model's heads and hidden units are cut over (models/tensor_parallel.py)


def device_sharding(*, split: bool) -> NamedSharding:
    """Over all devices: an array's first axis split, or the whole array on each."""
    spec = PartitionSpec(AXIS) if split else PartitionSpec()
    return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), spec)


def model_mesh(parts: int, *, num_devices: int | None = None) -> Mesh:
    """Devices as ("clients", "model"), `parts` neighbours for each model. num_devices: the first so many; None is all.

    Raises ValueError where parts does not divide them.
    """
    devices = jax.devices()[:num_devices]
    if parts < 1 or len(devices) % parts or (num_devices is not None and len(devices) < num_devices):
        raise ValueError(f"model_parallel={parts} needs so many devices, or a multiple: there are {jax.device_count()}")
    return Mesh(np.asarray(devices).reshape(-1, parts), (AXIS, MODEL_AXIS))


@jax.custom_vjp
def enter_cut(x):
    """x, the same on all devices of the model axis, as it enters the part that is cut: every device's own work gives a
    part of its gradient, and the backward pass adds them up (the f of Shoeybi et al., 2019)."""
    return x


enter_cut.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.psum(dx, MODEL_AXIS),))


@jax.custom_vjp
def leave_cut(y):
    """The sum over the model axis of what its devices made: the end of the part that is cut. The sum's gradient is
    that of each term (the g of Shoeybi et al.)."""
    return jax.lax.psum(y, MODEL_AXIS)


leave_cut.defvjp(lambda y: (jax.lax.psum(y, MODEL_AXIS), None), lambda _, dy: (dy,))


@jax.custom_vjp
def gather_cut(y):
    """[.., n] of each device of the model axis side by side, [.., parts n] on all. Backward every device takes its own
    part, as the cotangent is the same on all."""
    return jax.lax.all_gather(y, MODEL_AXIS, axis=y.ndim - 1, tiled=True)


def _own_part(width: int, dy):
    return (jax.lax.dynamic_slice_in_dim(dy, jax.lax.axis_index(MODEL_AXIS) * width, width, axis=dy.ndim - 1),)


gather_cut.defvjp(lambda y: (gather_cut(y), y.shape[-1]), _own_part)


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


def replicate(tree, *, copy: bool = True, mesh: Mesh | None = None):
    """Puts a tree on every device once, so that rounds do not copy it. mesh: the one that the other arrays lie on.

    copy: a device that holds an array already gets its own copy all the same, which may be donated. False spares the
    memory, for what is never donated: all devices of a CPU then share the one array.
    """
    sharding = device_sharding(split=False) if mesh is None else NamedSharding(mesh, PartitionSpec())

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
