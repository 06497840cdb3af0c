"""Each cause that ends a lead, against plans of changed scenarios; the map against single plans."""

import dataclasses

from fmfl_jax.experiment.plan_services.regimes import causes, regimes
from fmfl_jax.experiment.plan_services.ways import ways_of
from tests.experiment.plan_services.scenarios import golden, shipped, with_place


def test_the_lead_ends_where_a_plain_search_finds_it():
    scenario = golden()
    found = {cause.name.split(" ")[0].rstrip(","): cause for cause in causes(scenario)}
    assert found["round"].turns_at == "0.8258 s"  # facts: an idle cloud wins below .826 s
    assert all(cause.holds for cause in found.values())

    def leads(**changed):
        ways = {way.place: way for way in ways_of(with_place(scenario, "cloud", **changed))}
        return ways["cloud"].p95_s < ways["edge"].p95_s

    load = float(found["load"].turns_at.rstrip("%")) / 100
    assert leads(background_load=load - 0.01) and not leads(background_load=load + 0.01)
    assert leads(rtt_s=0.825) and not leads(rtt_s=0.827)
    assert leads(availability=0.951) and not leads(availability=0.95)
    assert found["outage"].turns_at == "up 95.00%"
    assert found["privacy"].turns_at == "private text"
    private = dataclasses.replace(scenario, streams=[dataclasses.replace(scenario.streams[0], private=True)])
    assert not causes(private)[-1].holds


def test_the_map_agrees_with_single_plans():
    scenario = shipped("assistant_7b")
    found = regimes(scenario)
    for i, j in ((3, 5), (20, 30), (38, 2), (10, 40)):
        here = with_place(
            scenario, "cloud", background_load=float(found.loads[j]), rtt_s=float(found.rtts_s[i]), availability=1.0
        )
        ways = [w for w in ways_of(here) if (w.stream, w.model) == ("chat", scenario.map.model)]
        best = min(ways, key=lambda way: way.p95_s)
        expected = best.place if best.p95_s <= scenario.streams[0].deadline_s else ""
        assert found.fastest[i, j] == expected
    assert len(set(found.fastest.flat)) >= 2 and len(set(found.best.flat)) >= 2
