"""Where a case study's soft prompt starts: at the server's text, unless that is the text of clients with privacy."""

import jax
import numpy as np
import pytest

from fmfl_jax.data.batches import EvaluationWindows, TokenWindows
from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.experiment.base import Base
from fmfl_jax.experiment.case_study import form_setup
from fmfl_jax.experiment.config.data import TextConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.prompt import PromptConfig
from tests.experiment.toys import MODEL, llama_data, llama_settings

PRIVATE = FederationConfig(privacy=("dp_sgd",), dp=DpConfig(noise_multiplier=1.0))
OF_CLIENTS = {"train": "own.txt", "eval": "other.txt"}


@pytest.mark.parametrize(
    ("federation", "text", "public"),
    [
        (FederationConfig(), OF_CLIENTS, True),
        (PRIVATE, {}, True),
        (PRIVATE, OF_CLIENTS | {"calib": "public.txt"}, True),
        (PRIVATE, OF_CLIENTS, False),
    ],
)
def test_the_text_that_a_prompt_starts_from(federation, text, public):
    params, data = init_params(MODEL, jax.random.key(0)), llama_data()
    windows, ids = data.windows, np.zeros(len(data.windows), np.int32)
    root = windows[5:7]
    held_out = EvaluationWindows(windows[:2], np.ones((2, 8), bool), 16)
    base = Base(MODEL, params, byte_tokenizer(), TokenWindows(windows, ids), held_out, root[:, :-1], root)
    config = llama_settings(federation, peft=PromptConfig(num_tokens=12), text=TextConfig(seq_len=8, **text))
    prompt = form_setup(config, base, data, params, "it").model.trainable["soft_prompt.embeddings"]
    embedding = np.asarray(params["embed_tokens.weight"], np.float32)
    rows = [int(np.flatnonzero((embedding == row).all(axis=1))[0]) for row in np.asarray(prompt)]
    assert (rows == root.reshape(-1)[:12].tolist()) == public
