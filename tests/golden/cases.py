"""For the tests: the golden cases as checkpoints on disk, and the logits of what was loaded."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fmfl_jax.peft.split import NoPeftConfig, split
from tests.golden import weights

HERE = pathlib.Path(__file__).parent
CASES = tuple(weights.CASES)


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    return dict(np.load(HERE / f"{name}.npz"))


def write_case(folder: pathlib.Path, case: str, **fields) -> pathlib.Path:
    """The case as transformers saves it (its config.json, with `fields` on top), written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(str(golden(f"llama_{case}")["config"])) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights.base_weights(case), folder / "model.safetensors")
    return folder


def logits(config, params, tokens, peft=NoPeftConfig(), trainable=None) -> np.ndarray:
    """float32 [B, T, V] of a base model, tuned by `trainable` where given."""
    model = split(config, params, peft, key=jax.random.key(0))
    run = jax.jit(lambda trainable, frozen, tokens: model.merge(trainable, frozen)(tokens))
    return np.asarray(run(model.trainable if trainable is None else trainable, model.frozen, jnp.asarray(tokens)))
