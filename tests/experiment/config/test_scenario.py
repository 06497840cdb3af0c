"""Scenario files: the shipped ones are read, and every mistake is one line that says where."""

import pathlib

import pytest

from fmfl_jax.experiment.config.scenario import read_scenario

SHIPPED = sorted((pathlib.Path(__file__).parents[3] / "launch" / "scenarios").glob("*.toml"))
LEAST = """
title = "least"
bandwidth_hz = 1e6
[[models]]
name = "m"
num_params = 1e6
weight_bytes = 1e6
quality = { t = 0.5 }
source = "none"
[[places]]
name = "edge"
compute_flops = 1e9
memory_bandwidth_bytes_s = 1e9
memory_bytes = 1e9
[[places]]
name = "cloud"
compute_flops = 1e12
memory_bandwidth_bytes_s = 1e12
memory_bytes = 1e9
[[streams]]
name = "s"
task = "t"
arrivals_per_s = 1
prompt_tokens = 10
up_bits = 1e3
spectral_efficiency = 1
deadline_s = 1
"""
MAP = '[map]\nstream = "s"\nmodel = "m"\nfirst = "cloud"\nsecond = "{}"\n'


def read(folder, text):
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return read_scenario(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenarios_are_read(path):
    scenario = read_scenario(path)
    assert scenario.map is not None and all(model.source for model in scenario.models)
    assert len(SHIPPED) == 3


def test_whole_numbers_are_numbers_and_defaults_are_filled_in(tmp_path):
    scenario = read(tmp_path, LEAST)
    assert scenario.streams[0].arrivals_per_s == 1.0 and isinstance(scenario.streams[0].deadline_s, float)
    assert scenario.level == 0.95 and scenario.map is None and scenario.places[0].wire_bps is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("title", "titel", "unknown keys titel"),
        ("deadline_s = 1", "", r"streams\[s\]: missing keys deadline_s"),
        ("deadline_s = 1", "deadline_s = 0", r"streams\[s\]: deadline_s=0: it lies before now"),
        ("deadline_s = 1", "deadline_s = nan", r"streams\[s\]\.deadline_s: expected a finite number"),
        ("deadline_s = 1", 'deadline_s = "soon"', r"streams\[s\]\.deadline_s: expected float, got 'soon'"),
        ("prompt_tokens = 10", "prompt_tokens = 1.5", r"streams\[s\]\.prompt_tokens: expected int"),
        ("prompt_tokens = 10", "prompt_tokens = true", r"streams\[s\]\.prompt_tokens: expected int"),
        ('"cloud"', '"edge"', "places must have distinct names"),
        ("{ t = 0.5 }", "{ t = 1.5 }", r"models\[m\]: quality of t must be in \[0, 1\]"),
        ("{ t = 0.5 }", "{ other = 0.5 }", "stream s: no model has a quality of task=t"),
        (
            'name = "edge"',
            'name = "edge"\nbackground_load = 1.2',
            r"places\[edge\]: background_load=1.2: requests come",
        ),
        ("memory_bytes = 1e9\n[[streams]]", "memory_bytes = 0\n[[streams]]", r"places\[cloud\]: memory_bytes must be"),
        ("[[streams]]", MAP.format("moon") + "[[streams]]", "'moon' is none of the places: edge, cloud"),
        ("[[streams]]", MAP.format("cloud") + "[[streams]]", "map: first and second are both 'cloud'"),
        ("[[streams]]", "[streams]", "streams: expected a list"),
        ("1e6\n[[models]]", "1e6 1e6\n[[models]]", r"scenario\.toml: .*line 3"),
        ("1e6\n[[models]]", "1e6\nlevel = 1.0\n[[models]]", "level=1: expected a share"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(tmp_path, old, new, message):
    assert old in LEAST
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, LEAST.replace(old, new, 1))
    assert "\n" not in str(caught.value).strip()


def test_there_must_be_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_scenario(tmp_path / "none.toml")
