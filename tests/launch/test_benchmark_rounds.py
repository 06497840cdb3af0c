"""The benchmark of rounds against a peer that only prints: what it is given, and the ratio."""

import json
import sys

from tests.commands import run


def test_in_turn_with_a_peer(shared_data, tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, sys; print(json.dumps({'tokens_per_s': 4.0, 'argv': sys.argv[1:]}))", encoding="utf-8"
    )
    status, printed, err = run(
        "launch.benchmark_rounds",
        f"--checkpoint={shared_data / 'ckpt' / 'TinyStories-656K'}",
        f"--text={shared_data / 'wikitext2' / 'wiki.test.tokens'}",
        "--max_chars=20000",
        "--seq_len=32",
        "--rounds=2",
        "--num_clients=2",
        "--local_steps=1",
        "--batch_size=1",
        "--pairs=1",
        f"--peer_python={sys.executable}",
        f"--peer_script={peer}",
    )
    assert status == 0, err
    theirs, ours, last = map(json.loads, printed.splitlines())
    assert {"--clients=2", "--seq_len=32", "--rounds=2", "--rank=8", "--batch_size=1"} <= set(theirs["argv"])
    assert last["median_ratio"] == ours["tokens_per_s"] / 4.0
    assert 5 < ours["nll_end"] < ours["nll_start"] < 8  # it reads the model and it learns
    assert min(ours["resident_bytes"], ours["peak_resident_bytes"]) > 4 * 650_000  # more than the weights
