"""Trace files read back as they were written, and each wrong line is named."""

import json

import numpy as np
import pytest

from fmfl_jax.services.scheduling.trace import TraceRequest, read_trace, requests_of, write_trace

TRACE = [
    TraceRequest(arrival_s=0.5, prompt='Ünïcode "quoted"\nline', max_tokens=3, client="7", priority=2, deadline_s=4.0),
    TraceRequest(arrival_s=0.25, prompt="", max_tokens=1),
]


def test_round_trip_by_arrival(tmp_path):
    path = tmp_path / "folder" / "trace.jsonl"
    write_trace(str(path), TRACE, [{"text": "more"}, {}])
    assert read_trace(str(path)) == [TRACE[1], TRACE[0]]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["text"] == "more"
    requests = requests_of(read_trace(str(path)))
    assert requests.arrivals_s.tolist() == [0.25, 0.5] and requests.priorities.tolist() == [0, 2]
    assert requests.deadlines_s.tolist() == [np.inf, 4.0]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "line 2: "),
        ("[1]", "line 2: expected an object"),
        ('{"arrival_s": 1, "prompt": "x"}', "line 2: .*'max_tokens'"),
        ('{"arrival_s": 1, "prompt": 5, "max_tokens": 3}', "line 2: prompt is 5"),
        ('{"arrival_s": 1, "prompt": "x", "max_tokens": 2.5}', "line 2: max_tokens is 2.5"),
        ('{"arrival_s": 1, "prompt": "x", "max_tokens": true}', "line 2: max_tokens is True"),
        ('{"arrival_s": NaN, "prompt": "x", "max_tokens": 1}', "line 2: arrival_s must be a finite number"),
        ('{"arrival_s": -1, "prompt": "x", "max_tokens": 1}', "line 2: arrival_s is -1"),
        ('{"arrival_s": 1, "prompt": "x", "max_tokens": 0}', "line 2: max_tokens is 0"),
        ('{"arrival_s": 1, "prompt": "x", "max_tokens": 1, "priority": null}', "line 2: priority is None"),
        ('{"arrival_s": 3, "prompt": "x", "max_tokens": 1, "deadline_s": 2}', "line 2: deadline_s is 2, not after"),
    ],
)
def test_wrong_lines(tmp_path, line, reason):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 0, "prompt": "x", "max_tokens": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        read_trace(str(path))


def test_an_empty_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no requests"):
        read_trace(str(path))
