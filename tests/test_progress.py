"""Lines of progress where the output is no terminal: at most one a minute, with the right figures."""

from fmfl_jax import progress


def test_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(12, label="awq", unit="block", done=2)
    for seconds in (25, 25, 25, 25, 25, 1, 1):
        now[0] += seconds
        bar.advance()
    bar.show(loss="2.310")
    for _ in bar.track(range(3)):
        now[0] += 20
    # 3 blocks took 75 s, 7 more are left: 175 s. The count starts anew with each line.
    assert capsys.readouterr().err.splitlines() == [
        "awq: 5 of 12 blocks, 75 s, about 175 s left",
        "awq: 10 of 12 blocks, 147 s, about 37 s left, loss 2.310",
    ]


def test_short_work_writes_nothing(capsys):
    assert list(progress.Progress(3, label="evaluation", unit="batch").track("abc")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
