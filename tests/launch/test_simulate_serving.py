"""launch.simulate_serving as a user types it: the table beside theory, traces written and read, and what is refused."""

import json
import re

import pytest

from tests.commands import run

COMMAND = "launch.simulate_serving"


def rows(printed):
    """The table as dictionaries by (server, policy)."""
    lines = [line.split() for line in printed.splitlines()]
    start = next(i for i, line in enumerate(lines) if line and line[0] == "server")
    names = re.sub(r"(\w) (s|up)\b", r"\1_\2", printed.splitlines()[start]).split()
    return {(line[0], line[1]): dict(zip(names, line)) for line in lines[start + 1 :]}


def test_the_table_is_near_theory_and_orders_policies():
    one = "--server=one"
    long_and_short = ["--task=output=4,output_sigma=0,share=4", "--task=output=80,output_sigma=0.2,priority=1"]
    status, printed, err = run(COMMAND, one, "--arrivals=poisson:1.2", "--num_requests=40000", *long_and_short)
    assert status == 0, err
    table = rows(printed)
    assert len(table) == 6
    fcfs, priority = table["one", "fcfs"], table["one", "priority"]
    for row in (fcfs, priority, table["one", "priority:preemptive=true"]):
        assert float(row["mean_s"]) == pytest.approx(float(row["theory_s"]), rel=0.1)
    assert float(priority["mean_s"]) < float(fcfs["mean_s"]) and float(fcfs["longest_s"]) < float(priority["longest_s"])
    aged = table["one", "shortest:noise=0.5,ageing=0.5"]
    assert float(aged["longest_s"]) <= float(aged["bound_s"]) and priority["bound_s"] == "-"
    assert len(set(row["busy"] for row in table.values())) == 1  # all do the same work


def test_a_written_trace_is_read(tmp_path):
    text, trace = tmp_path / "text.txt", tmp_path / "trace.jsonl"
    text.write_text("one two three four five six seven eight nine ten\n" * 40, encoding="utf-8")
    drawn = [f"--prompts={text}", f"--write_trace={trace}", "--num_requests=30", "--num_clients=3"]
    status, printed, err = run(COMMAND, *drawn)
    assert status == 0 and f"30 requests in {trace}" in printed, err
    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 30 and {line["client"] for line in lines} == {"0", "1", "2"}
    assert all(("deadline_s" in line) == (line["priority"] == 0) for line in lines)
    status, printed, err = run(COMMAND, f"--requests={trace}", "--policy=fcfs", "--timeout_s=0.5", "--retries=1")
    table = rows(printed)
    assert status == 0 and list(table) == [("one", "fcfs"), ("static", "fcfs"), ("continuous", "fcfs")], err
    assert float(table["one", "fcfs"]["tries"]) > 1 and table["one", "fcfs"]["gave_up"] != "0.0%"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--arrivals=poisson:50"], "one: the queue is unstable: its load is 2"),
        (["--server=batch", "--arrivals=poisson:9"], "batch: the queue is unstable: its load is 1.080"),
        (["--server=many"], "--server=many: expected one of one, static, continuous, batch"),
        (["--policy=fast"], "--policy=fast: expected one of fcfs, priority, shortest, edf"),
        (["--task=deadline_s=-2"], "deadline_s=-2.0: expected above 0"),
        (["--write_trace=x"], "--write_trace needs --prompts"),
        (["--kv_tokens=20", "--server=continuous"], "kv_tokens=20: a request has"),
        (["--server=static", "--policy=priority:true"], "--policy=priority:true: a batch does not preempt"),
        (["--timeout_s=-1"], "--timeout_s=-1"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    status, _, err = run(COMMAND, "--num_requests=500", *flags)
    assert status == 2 and said in err and err.startswith("error: ") and len(err.splitlines()) == 1, err


def test_a_line_of_the_table_that_has_no_steady_state_says_so():
    status, printed, err = run(COMMAND, "--arrivals=poisson:2.2", "--num_requests=3000", "--policy=fcfs")
    assert status == 0, err
    assert "one: the queue is unstable: its load is 1." in printed
    assert list(rows(printed)) == [("continuous", "fcfs")] or ("one", "fcfs") not in rows(printed)
