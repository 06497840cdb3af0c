"""The shipped scenarios, and the facts' golden one, for the tests of plans."""

import dataclasses
import functools
import pathlib

from fmfl_jax.experiment.config.scenario import read_scenario

SCENARIOS = pathlib.Path(__file__).parents[3] / "launch" / "scenarios"


@functools.cache
def shipped(name):
    return read_scenario(SCENARIOS / f"{name}.toml")


@functools.cache
def golden():
    """Facts, section 1: 7B in 4 bits, 512 tokens in, 64 out, no queue, no payload, no cache."""
    base = shipped("assistant_7b")
    model = dataclasses.replace(base.model("llama-7b-int4"), kv_bytes_per_token=0.0)
    places = [
        dataclasses.replace(p, background_load=0.0, wire_bps=None, availability=1.0, price_per_token=0.0)
        for p in base.places
    ]
    chat = dataclasses.replace(base.streams[0], up_bits=0.0, down_bits=0.0, arrivals_per_s=0.0, deadline_s=1.0)
    return dataclasses.replace(base, models=[model], places=places, streams=[chat], splits=[], tensor_parallel=[])


def with_place(scenario, name, **changed):
    places = [dataclasses.replace(p, **changed) if p.name == name else p for p in scenario.places]
    return dataclasses.replace(scenario, places=places)
