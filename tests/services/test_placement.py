"""Placement: the golden latencies, memory and money by hand, and the reason of every choice."""

import dataclasses

import pytest

from fmfl_jax.services import placement as p

MODEL = p.ModelSize(num_params=6.7e9, weight_bytes=3.7e9)
REQUEST = p.RequestSize(prompt_tokens=512, output_tokens=64)
CLOUD = p.Node(name="cloud", compute_flops=400e12, memory_bandwidth_bytes_s=3.35e12, memory_bytes=80e9)
EDGE = p.Node(name="edge", compute_flops=60e12, memory_bandwidth_bytes_s=0.3e12, memory_bytes=24e9)
CLIENT = p.Node(name="client", compute_flops=4e12, memory_bandwidth_bytes_s=60e9, memory_bytes=8e9)
WAN, LAN = p.Link(rate_bps=1e8, rtt_s=0.06), p.Link(rate_bps=1e8, rtt_s=0.01)


def costs(queue_s=0.0):
    return {
        "cloud": p.request_cost(CLOUD, WAN, MODEL, REQUEST, queue_s=queue_s),
        "edge": p.request_cost(EDGE, LAN, MODEL, REQUEST),
        "client": p.request_cost(CLIENT, None, MODEL, REQUEST),
    }


def options(queue_s=0.0, **changed):
    """The three placements; changed: fields of Option by name."""
    found = [p.Option(name, cost, trusted=name != "cloud") for name, cost in costs(queue_s).items()]
    return [option._replace(**changed.get(option.name, {})) for option in found]


def test_golden_latencies():
    found = {name: cost.latency_s for name, cost in costs().items()}
    assert found["cloud"] == pytest.approx(0.147839, abs=5e-7)
    assert found["edge"] == pytest.approx(0.913680, abs=5e-7)
    assert found["client"] == pytest.approx(5.661867, abs=5e-7)
    for rtt, best in ((0.825, "cloud"), (0.827, "edge")):  # an idle cloud wins below .826 s
        cloud = p.request_cost(CLOUD, p.Link(rate_bps=1e8, rtt_s=rtt), MODEL, REQUEST)
        options = [p.Option("cloud", cloud), p.Option("edge", costs()["edge"])]
        assert p.choose(options, p.Limits()).placement == best


def test_cache_batches_and_compute_bound_decoding_by_a_loop():
    kv = p.kv_bytes_per_token(32, 8, 128, 2.0)
    assert kv == 131_072
    model = p.ModelSize(num_params=6.7e9, weight_bytes=3.7e9, kv_bytes_per_token=kv)
    for batch in (1, 16, 400):
        total = 0.0
        for t in range(64):
            traffic = (3.7e9 + batch * kv * (512 + t)) / 0.3e12
            total += max(traffic, 2 * 6.7e9 * batch / 60e12)
        assert p.decode_s(EDGE, model, 512, 64, batch) == pytest.approx(total)
        assert p.prefill_s(EDGE, model, 512, batch) == pytest.approx(2 * 6.7e9 * 512 * batch / 60e12)
    assert p.prefill_s(EDGE, model, 1) == pytest.approx(3.7e9 / 0.3e12)
    request = dataclasses.replace(REQUEST, output_tokens=0)
    most = int((24e9 - 3.7e9) // (kv * 512))
    assert p.fits(EDGE, model, request, most) and not p.fits(EDGE, model, request, most + 1)


def test_price_energy_and_transfer_by_hand():
    node = dataclasses.replace(EDGE, price_per_s=2.0, price_per_token=0.001, active_power_w=300.0)
    link = p.Link(rate_bps=1e6, rtt_s=0.1, price_per_bit=1e-6, energy_j_per_bit=1e-5)
    request = p.RequestSize(prompt_tokens=10, output_tokens=5, up_bits=3e5, down_bits=1e5)
    cost = p.request_cost(node, link, MODEL, request, queue_s=0.5, batch=4)
    compute = 6 * 3.7e9 / 0.3e12  # bound by memory: the prompts and five steps
    assert cost.compute_s == pytest.approx(compute) and cost.transfer_s == pytest.approx(0.5)
    assert cost.latency_s == pytest.approx(0.5 + 0.5 + compute)
    assert cost.price == pytest.approx(0.4 + 2 * compute / 4 + 0.015)
    assert cost.energy_j == pytest.approx(4.0 + 300 * compute / 4)


@pytest.mark.parametrize(
    "changed, limits, reason",
    [
        ({"cloud": {"up": False}}, {}, "outage"),
        ({}, {"private": True}, "privacy"),
        ({"cloud": {"cost": costs()["cloud"]._replace(price=3.0)}}, {"max_price": 1.0}, "price"),
        ({"cloud": {"cost": costs(5.0)["cloud"]}}, {"deadline_s": 1.0}, "load"),
        ({"cloud": {"cost": costs()["cloud"]._replace(latency_s=float("nan"))}}, {"deadline_s": 1.0}, "latency"),
    ],
)
def test_what_keeps_the_cloud_from_answering_is_said(changed, limits, reason):
    limits = p.Limits(**limits)
    given = options(**changed)
    assert p.choose(given, limits, preferred="cloud") == ("fallback", "edge", "cloud", reason)
    assert p.choose(given, limits, preferred="cloud", cached=True) == ("cached", None, "cloud", reason)
    if reason != "latency":  # without a preference, the same first choice
        assert p.choose(given, limits) == ("fallback", "edge", "cloud", reason)
    alone = [option for option in given if option.name == "cloud"]
    assert p.choose(alone, limits) == ("none", None, "cloud", reason)


def test_the_first_choice_answers_live_also_where_the_cache_could():
    assert p.choose(options(), p.Limits(), cached=True) == ("live", "cloud", "cloud", "")
    assert p.choose(options(), p.Limits(), preferred="client") == ("live", "client", "client", "")
    assert p.choose(options(queue_s=2.0), p.Limits()) == ("live", "edge", "cloud", "load")
    assert p.choose(options(queue_s=2.0), p.Limits(), preferred="cloud") == ("live", "cloud", "cloud", "")
    small = options(cloud={"fits": False})
    assert p.choose(small, p.Limits()) == ("live", "edge", "edge", "")
    assert p.choose(small, p.Limits(), preferred="cloud") == ("fallback", "edge", "cloud", "memory")
    assert p.choose(options(), p.Limits(deadline_s=0.1)) == ("none", None, "cloud", "latency")


def test_summary_by_hand():
    live, down = p.Decision("live", "edge", "edge", ""), p.Decision("none", None, "cloud", "outage")
    cost = p.Cost(2.0, 0.5, 0.5, 1.0, 4.0, 8.0)
    cached = p.Decision("cached", None, "cloud", "outage")
    found = p.summarize([live, live, down, cached], [cost, cost._replace(latency_s=4.0), None, None])
    assert found.shares == {"live": 0.5, "cached": 0.25, "fallback": 0.0, "none": 0.25}
    assert found.reasons == {"outage": 2} and found.served_in_outage == 0.5
    assert (found.latency_p50_s, found.mean_price, found.mean_energy_j) == (3.0, 2.0, 4.0)
    assert p.summarize([down], [None])[2:] == (None, None, 0, 0, 0.0)
    assert p.summarize([live], [cost]).served_in_outage is None


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="compute_flops must be above 0"):
        dataclasses.replace(CLOUD, compute_flops=0.0)
    with pytest.raises(ValueError, match="rtt_s must be a finite number"):
        p.Link(rate_bps=1.0, rtt_s=float("nan"))
    with pytest.raises(ValueError, match="preferred is 'moon', expected one of"):
        p.choose(options(), p.Limits(), preferred="moon")
    with pytest.raises(ValueError, match="options must be distinct"):
        p.choose([], p.Limits())
    with pytest.raises(ValueError, match="prompt_tokens must be at least 1"):
        p.RequestSize(prompt_tokens=0, output_tokens=1)
