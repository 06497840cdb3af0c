"""Case studies whose base is cut over devices: the same federation as with the base whole on each."""

import numpy as np
import pytest

from fmfl_jax.experiment.case_study import run_case_study
from fmfl_jax.experiment.config.case_study import FineTuning
from fmfl_jax.experiment.config.data import TextConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.loop.records import read_history
from fmfl_jax.experiment.methods.algorithms import FfaLora
from fmfl_jax.experiment.methods.contributions import LeaveOneOut
from fmfl_jax.experiment.methods.personalizations import Ditto
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import FullConfig
from tests.experiment.toys import llama_rounds, llama_settings


def settings(parts, num_rounds, **more):
    fields = {
        "federation": FederationConfig(contribution=LeaveOneOut()),
        "text": TextConfig(seq_len=16, max_eval_windows=6),
        "weights": ("rtn",),
        "pretrain": PretrainConfig(num_steps=2, batch_size=4, learning_rate=1e-3),
        "rounds": llama_rounds(num_rounds),
        "model_parallel": parts,
    }
    return llama_settings(**fields | more)


def test_a_cut_base_gives_the_same_federation(tmp_path, only_devices):
    """Perplexities, losses, contributions; stopped after a round and continued; less memory on a device."""
    only_devices(4)
    silent = {"say": lambda line: None}
    (whole,) = run_case_study(settings(1, 2), tmp_path / "whole", **silent)
    run_case_study(settings(2, 1), tmp_path / "cut", **silent)
    (tmp_path / "cut" / "setups" / "it-rtn" / "row.json").unlink()
    (cut,) = run_case_study(settings(2, 2), tmp_path / "cut", **silent)
    for name in ("ppl_before", "ppl"):
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-5)
    np.testing.assert_allclose(cut["contributions"], whole["contributions"], atol=1e-5)
    histories = [read_history(tmp_path / name / "setups" / "it-rtn", up_to_round=2) for name in ("whole", "cut")]
    for name in ("clients", "loss", "delta_norm"):
        for a, b in zip(*([record[name] for record in history[1:]] for history in histories), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
    assert cut["peak_memory_bytes"] < 0.9 * whole["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"model_parallel": 3}, "model_parallel=3 does not divide 2 heads"),
        ({"peft": LoraConfig(rank=4, dropout=0.1)}, "draws no dropout"),
        ({"fine_tuning": {"full": FineTuning(peft=FullConfig(), learning_rate=1e-2)}}, "frozen bases"),
        ({"federation": FederationConfig(personalization=Ditto(0.1))}, "model_parallel=2 with personal models"),
        ({"federation": FederationConfig(algorithm=FfaLora())}, "model_parallel=2 with algorithm=ffa_lora"),
    ],
)
def test_refused_before_anything_is_made(more, reason):
    with pytest.raises(ValueError, match=reason):
        settings(2, 1, **{"weights": ("fp",)} | more)
