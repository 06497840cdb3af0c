"""A LoRA trained here, in Hugging Face PEFT's format: what `peft.PeftModel.from_pretrained(base, folder)` loads.

python examples/lora_to_peft.py [FOLDER]
"""

import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmfl_jax as fl


def main(folder: str | pathlib.Path) -> fl.LoraConfig:
    config = fl.llama_preset("tiny", vocab_size=64)
    params, lora = (
        fl.init_params(config, jax.random.key(0)),
        fl.LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
    )
    model = fl.split(config, params, lora, key=jax.random.key(1))

    def loss_fn(trainable, frozen, windows, key):
        return jnp.mean(fl.token_nll(model.merge(trainable, frozen), windows))

    parts = fl.make_round(fl.fed_opt(jax.value_and_grad(loss_fn), optax.adamw(1e-2)))
    run = fl.pmap_round(parts)
    state, frozen = fl.replicate(parts.init(model.trainable, 0)), fl.replicate(model.frozen)
    windows = np.arange(4 * 2 * 2 * 17, dtype=np.int32).reshape(4, 2, 2, 17) % 7  # [clients, steps, batch, T + 1]
    for _ in range(5):
        cohort = fl.Cohort(np.arange(4, dtype=np.int32), np.ones(4, np.float32), windows)
        state, metrics, _ = run(state, frozen, fl.put_on_devices(cohort))
    fl.save_peft(folder, lora, jax.device_get(state.params), config, base_model_name="base")
    files = ", ".join(sorted(path.name for path in pathlib.Path(folder).iterdir()))
    print(f"loss {float(metrics['loss']):.3f}; {folder}: {files}")
    return fl.load_peft(folder, config)[0]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(tempfile.mkdtemp()) / "lora")
