"""A trace file: requests with their prompts, one JSON object a line.

    {"arrival_s": 0.42, "prompt": "Once upon a time", "max_tokens": 32, "client": "3", "priority": 1, "deadline_s": 6.0}

arrival_s and deadline_s are on one clock that starts at 0. client, priority (0, which comes first) and deadline_s
(none) may be left out. A file of answers (launch.serve --answers) has prompt_tokens and output_tokens besides, and
reads as a trace too.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.scheduling.requests import Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class TraceRequest:
    """A line. prompt_tokens, output_tokens: counted, where the line has them."""

    arrival_s: float
    prompt: str
    max_tokens: int
    client: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), _TYPES[field.name]
            if not (isinstance(value, expected) and not isinstance(value, bool)) and (value, field.default) != (
                None,
                None,
            ):
                raise ValueError(f"{field.name} is {value!r}")
        if self.arrival_s < 0:
            raise ValueError(f"arrival_s is {self.arrival_s}, expected 0 or more")
        if self.deadline_s is not None and self.deadline_s <= self.arrival_s:
            raise ValueError(f"deadline_s is {self.deadline_s}, not after the arrival at {self.arrival_s}")
        for name in ("max_tokens", "prompt_tokens", "output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


_TYPES = {
    "arrival_s": (int, float),
    "prompt": str,
    "max_tokens": int,
    "client": str,
    "priority": int,
    "deadline_s": (int, float),
    "prompt_tokens": int,
    "output_tokens": int,
}


def read_trace(path: str) -> list[TraceRequest]:
    """The file's requests by arrival. Other keys than those of `TraceRequest` are passed over.

    Raises ValueError, naming file and line, for a line that is no request, and for a file without any.
    """
    trace = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("expected an object")
                trace.append(TraceRequest(**{name: value for name, value in record.items() if name in _TYPES}))
            except (ValueError, TypeError) as error:
                reason = str(error).replace("TraceRequest.__init__() ", "")
                raise ValueError(f"{path}, line {number}: {reason}") from None
    if not trace:
        raise ValueError(f"{path} has no requests")
    return sorted(trace, key=lambda request: request.arrival_s)


def write_trace(path: str, trace: Sequence[TraceRequest], more: Sequence[dict] | None = None) -> None:
    """As `read_trace` reads it, without the fields that are left out; more: other keys of each line."""
    lines = []
    for request, others in zip(trace, [{}] * len(trace) if more is None else more, strict=True):
        fields = {name: value for name, value in dataclasses.asdict(request).items() if value is not None}
        lines.append(json.dumps(fields | others, ensure_ascii=False))
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def requests_of(trace: Sequence[TraceRequest]) -> Requests:
    """Arrivals, priorities and deadlines, for the event loops."""
    return Requests(
        arrivals_s=np.asarray([request.arrival_s for request in trace], np.float64),
        priorities=np.asarray([request.priority for request in trace]),
        deadlines_s=np.asarray([math.inf if r.deadline_s is None else r.deadline_s for r in trace]),
    )
