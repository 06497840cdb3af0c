"""launch.fm_services as a user types it: mistakes end in one line, before a model is read or a folder is made."""

import pytest

from tests.launch.test_federated import run


@pytest.mark.slow
def test_mistakes_end_in_one_line(tmp_path):
    lacking = tmp_path / "lacking.tsv"
    lacking.write_text("Rain.\tweather\nA late goal.\tsports\n", encoding="utf-8")
    both = [f"--train={lacking}", f"--test={lacking}"]
    for place, (flags, message) in enumerate(
        (
            (["--task=agnews"], "--task=agnews needs --train=FILE and --test=FILE"),
            (both, "class 'cooking' of task topics is the label of no row of the data"),
            (["--logits=bits:0"], "logits=bits:0: expected 1 to 16 bits a logit, got 0"),
            (["--services=generate"], "--services=generate needs a --checkpoint"),
            (["--services=silos"], "--services=silos needs a --checkpoint"),
            (["--services=features"], "--services=features needs features: --student=hidden, not --student=linear"),
            (["--services=distill", "--fm_access=text"], "--services=distill needs the FM's logits"),
            (["--toxicity_scorer=json:loads_"], "--toxicity_scorer=json:loads_: expected MODULE:FUNCTION"),
            (["--template=auto"], "--template=auto needs a --checkpoint"),
            (["--template=nothing"], "task topics has no template 'nothing'"),
        )
    ):
        status, _, err = run("launch.fm_services", *flags, f"--out={tmp_path / str(place)}")
        assert status == 2 and message in err and len(err.splitlines()) == 1, err
        assert not (tmp_path / str(place)).exists()
