"""The case study of the paper (Table II), from a LLaMA checkpoint to the table.

With no flags: a small byte-level LLaMA is pre-trained on one half of the English text that ships with CPython and tuned
by 20 clients on the other half; no download.

On your own model and text:
  python -m launch.case_study --checkpoint=DIR --train_text=FILE_OR_DIR --eval_text=FILE --out=DIR

The same command with the same --out continues a run that was stopped.
"""

import jax
import jax.numpy as jnp
from absl import flags

from fmfl_jax.experiment.case_study import run_case_study
from fmfl_jax.experiment.loop.records import claim, settings_of
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.report.case_study import write_report
from fmfl_jax.models.params import num_params
from launch import app
from launch.device_memory import require_memory
from launch.flags import federation as federation_flags
from launch.flags import fine_tuning as fine_tuning_flags
from launch.flags import network as network_flags
from launch.flags import run as run_flags

_PEFT = flags.DEFINE_list("peft", ["lora", "adapter", "prompt"], "Any of lora, adapter, prompt, prefix, full.")
_WEIGHTS = flags.DEFINE_list("weights", ["fp", "awq"], "Any of fp, awq, gptq, rtn (round to nearest).")
_OUT = flags.DEFINE_string("out", "runs/case_study", "Folder of the report and of the run's state.")


def require_room(config) -> None:
    """Raises ValueError where the device cannot hold a random base model, and XLA's CPU backend its float32 copies."""
    device = jax.devices()[0]
    per_weight = jnp.dtype(config.dtype).itemsize + (4 if device.platform == "cpu" and config.dtype != "float32" else 0)
    require_memory(device, per_weight * num_params(config.model), "--random_init of this --model")


def main():
    config = run_flags.config_from_flags(peft=_PEFT.value, weights=_WEIGHTS.value)
    if config.random_init:
        require_room(config)
    directory = _OUT.value
    with run_lock(directory):
        claim(directory, settings_of(config))
        rows = run_case_study(config, directory, say=app.say)
        if jax.process_index() == 0:
            app.say("\n" + write_report(directory, rows))
    app.say(f"report: {directory}/table.md, table.json, perplexity.png, costs.png, config.json, tensorboard/")


if __name__ == "__main__":
    app.run(main, run_flags, network_flags, federation_flags, fine_tuning_flags)
