"""Global pre-training on public text (section IV-A of the paper): AdamW, warm-up and cosine, data-parallel."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax import streams
from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.loop.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import init_params
from fmfl_jax.optimize import optimizer_step
from fmfl_jax.parallel import AXIS, process_devices, replicate
from fmfl_jax.peft.split import FullConfig, split
from fmfl_jax.progress import Progress


def pretrain(config: LlamaConfig, train: PretrainConfig, windows: np.ndarray, *, directory: str | pathlib.Path) -> dict:
    """Trains a fresh model on windows int32 [W, T+1] and returns its parameters, {name: array}.

    The state is kept in `directory` every checkpoint_every steps; a stopped run goes on from there, to the same bits.
    """
    devices = jax.device_count()
    if train.batch_size % devices:
        raise ValueError(f"pre-training batch_size {train.batch_size} must be a multiple of the {devices} devices")
    model = split(config, init_params(config, jax.random.key(train.seed)), FullConfig(), key=jax.random.key(0))
    warmup = min(100, train.num_steps // 10 + 1)
    decay = max(train.num_steps, warmup + 1)  # optax takes no schedule that ends with the warm-up
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, warmup, decay, 0.1 * train.learning_rate)
    matrices = jax.tree.map(lambda x: x.ndim > 1, model.trainable)  # norms are not decayed
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=train.weight_decay, mask=matrices)
    )

    def step(params, opt_state, batch):
        loss, grad = jax.value_and_grad(lambda p: jnp.mean(token_nll(model.merge(p, {}), batch)))(params)
        loss, grad = jax.lax.pmean((loss, grad), AXIS)
        return *optimizer_step(optimizer, grad, opt_state, params), loss

    step = jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=(0, 1))
    state = replicate((model.trainable, optimizer.init(model.trainable)))
    with open_checkpoints(directory) as checkpoints:
        restored = restore_state(checkpoints, state)
        start, (params, opt_state) = restored if restored is not None else (0, state)
        progress = Progress(train.num_steps, label="pre-training", unit="step", done=start)
        for i in progress.track(range(start, train.num_steps)):
            rows = streams.host_rng(streams.PRETRAIN, train.seed, i).choice(len(windows), train.batch_size)
            batch = windows[rows].reshape(devices, -1, windows.shape[1])[process_devices()]
            params, opt_state, loss = step(params, opt_state, batch)
            if (i + 1) % 20 == 0:
                progress.show(loss=f"{float(loss):.3f}")
            if (i + 1) % train.checkpoint_every == 0 or i + 1 == train.num_steps:
                save_state(checkpoints, i + 1, (params, opt_state))
    return params
