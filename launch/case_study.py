"""The case study of the paper (Table II), from a LLaMA checkpoint to the table.

With no flags: a small byte-level LLaMA is pre-trained on one half of the English text that ships with CPython and tuned
by 20 clients on the other half; no download.

On your own model and text:
  python -m launch.case_study --checkpoint=DIR --train_text=FILE_OR_DIR --eval_text=FILE --out=DIR

The same command with the same --out continues a run that was stopped.
"""

from absl import flags
import jax

from fmfl_jax.experiment.case_study import claim_folder, run_case_study
from fmfl_jax.experiment.report import write_report
from launch import app
from launch.run_flags import config_from_flags

_PEFT = flags.DEFINE_list("peft", ["lora", "adapter", "prompt"], "Any of lora, adapter, prompt, prefix, full.")
_WEIGHTS = flags.DEFINE_list("weights", ["fp", "awq"], "Any of fp, awq, rtn (round to nearest).")
_OUT = flags.DEFINE_string("out", "runs/case_study", "Folder of the report and of the run's state.")


def main():
    config = config_from_flags(peft=_PEFT.value, weights=_WEIGHTS.value)
    directory = _OUT.value
    claim_folder(directory, config)
    rows = run_case_study(config, directory, say=app.say)
    if jax.process_index() == 0:
        app.say("\n" + write_report(directory, rows))
    app.say(f"report: {directory}/table.md, table.json, perplexity.png, costs.png, config.json, tensorboard/")


if __name__ == "__main__":
    app.run(main)
