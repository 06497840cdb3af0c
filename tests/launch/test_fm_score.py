"""launch.fm_score on a tiny random model: the table, the cache of a second run, and what is refused."""

import jax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from tests.commands import run


@pytest.mark.slow
def test_a_second_run_asks_nothing(tmp_path):
    config = llama_preset("tiny", num_layers=1, max_seq_len=256)
    save_checkpoint(tmp_path / "model", config, init_params(config, jax.random.key(0)))
    news = tmp_path / "news.jsonl"
    news.write_text("".join(f'{{"body": "note {i}", "kind": {i % 4}}}\n' for i in range(8)), encoding="utf-8")
    flags = [f"--checkpoint={tmp_path / 'model'}", f"--cache={tmp_path / 'scores'}", f"--test={news}"]
    flags += ["--text_column=body", "--label_column=kind", f"--labelled={news}", "--template=auto"]
    first, second = run("launch.fm_score", *flags), run("launch.fm_score", *flags)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert all(f"\n{row}" in first[1] for row in ("raw", "contextual", "batch", "raw, T = ", "batch, T = "))
    # Both templates with 8 texts, and the chosen one with 3 texts without content; all else was asked before.
    assert "16 scores were there, 19 were asked for" in first[1] and "35 scores were there, 0 were asked" in second[1]
    table = lambda said: [line for line in said.splitlines() if "examples/s" not in line and "cache" not in line]
    assert table(first[1]) == table(second[1])
