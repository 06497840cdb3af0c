"""A scenario of `launch.plan_services`: models, places, streams of requests, in one TOML file.

    title = "A newsroom"
    bandwidth_hz = 5e6                        # all streams share it
    [[models]]                                # quality: measured, by task, in [0, 1]
    name = "smollm2-int4"
    quality = { agnews = 0.795 }
    [[places]]                                # a node of services/placement.py, and the way to it
    [[streams]]                               # requests of one task, from `count` users
    [map]                                     # optional: of the regime map
    [[splits]]  [[tensor_parallel]]           # optional: one model over several devices

`launch/scenarios/` has three. Every key is a field below, those without a default must be there.
"""

import dataclasses
import math
import pathlib
import tomllib
import types
import typing

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive, share
from fmfl_jax.services.placement import ModelSize, Node


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class ModelRow(ModelSize):
    """A model in one format. quality: by task; source: where it was measured. num_layers, activation_bytes (of one
    token between two layers): for splits."""

    name: str
    quality: dict[str, float]
    source: str
    num_layers: int = 1
    activation_bytes: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        at_least(0, activation_bytes=self.activation_bytes)
        at_least(1, num_layers=self.num_layers)
        for task, quality in self.quality.items():
            share(f"quality of {task}", quality)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class PlaceRow(Node):
    """A node and the way to it. own: every stream has one for itself, and nothing goes over the air. rtt_s, wire_bps:
    of the hops behind the radio, None without any. replicas: equal servers. background_load: share of the time that
    others keep each busy, with exponential requests of background_mean_s."""

    own: bool = False
    trusted: bool = True
    rtt_s: float = 0.0
    wire_bps: float | None = None
    replicas: int = 1
    background_load: float = 0.0
    background_mean_s: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        positive(background_mean_s=self.background_mean_s)
        at_least(0, rtt_s=self.rtt_s, background_load=self.background_load)
        at_least(1, replicas=self.replicas)
        if self.background_load >= 1:
            raise ValueError(
                f"background_load={self.background_load:g}: requests come faster than they are served, and the queue "
                "grows"
            )
        if self.wire_bps is not None:
            positive(wire_bps=self.wire_bps)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class StreamRow:
    """Requests of one task. count: equal users. Output: log-normal with exp(output_mu) tokens in the middle, cut at
    output_limit; output_sigma 0 is always the same number. tx_psd_w_per_hz: the transmitter's power per Hz, which
    makes a bit cost the same joules in any bandwidth. private: to trusted places only."""

    name: str
    task: str
    arrivals_per_s: float
    prompt_tokens: int
    up_bits: float
    spectral_efficiency: float
    deadline_s: float
    count: int = 1
    output_median: float = 0.0
    output_sigma: float = 0.0
    output_limit: int = 1
    down_bits: float = 0.0
    private: bool = False
    max_price: float | None = None
    tx_psd_w_per_hz: float = 0.0

    def __post_init__(self):
        at_least(
            0,
            arrivals_per_s=self.arrivals_per_s,
            up_bits=self.up_bits,
            down_bits=self.down_bits,
            output_median=self.output_median,
            output_sigma=self.output_sigma,
            tx_psd_w_per_hz=self.tx_psd_w_per_hz,
        )
        at_least(1, prompt_tokens=self.prompt_tokens, count=self.count, output_limit=self.output_limit)
        positive(spectral_efficiency=self.spectral_efficiency)
        if not self.deadline_s > 0:
            raise ValueError(f"deadline_s={self.deadline_s:g}: it lies before now")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapRow:
    """Of the regime map: one stream and model, the place that is varied (`first`, the cloud) and its rival."""

    stream: str
    model: str
    first: str
    second: str


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class SplitRow:
    """A model's layers over devices (names of places, the first is the client's), all linked alike. tokens: that go
    through at once."""

    model: str
    devices: list[str]
    link_bps: float
    link_latency_s: float
    tokens: int = 1

    def __post_init__(self):
        positive(link_bps=self.link_bps)
        at_least(0, link_latency_s=self.link_latency_s)
        at_least(1, tokens=self.tokens)
        if not self.devices:
            raise ValueError("devices is empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class TensorParallelRow:
    """A model's layers cut over equal devices at a place. name: of the link."""

    name: str
    model: str
    place: str
    num_devices: list[int]
    link_bps: float
    link_latency_s: float

    def __post_init__(self):
        positive(link_bps=self.link_bps)
        at_least(0, link_latency_s=self.link_latency_s)
        if not self.num_devices or min(self.num_devices) < 1:
            raise ValueError(f"num_devices={self.num_devices}: expected some numbers of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Scenario:
    """level: the share of a stream's requests that its deadline is for. quality_value: what quality 1 is worth in the
    currency of the prices; price_per_j: what a joule costs in it."""

    title: str
    bandwidth_hz: float
    models: list[ModelRow]
    places: list[PlaceRow]
    streams: list[StreamRow]
    level: float = 0.95
    quality_value: float = 1.0
    price_per_j: float = 0.0
    map: MapRow | None = None
    splits: list[SplitRow] = dataclasses.field(default_factory=list)
    tensor_parallel: list[TensorParallelRow] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        positive(bandwidth_hz=self.bandwidth_hz, quality_value=self.quality_value)
        at_least(0, price_per_j=self.price_per_j)
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level:g}: expected a share in (0, 1)")
        names = {}
        for kind in ("models", "places", "streams"):
            names[kind] = [row.name for row in getattr(self, kind)]
            if not names[kind] or len(set(names[kind])) != len(names[kind]):
                raise ValueError(f"{kind} must have distinct names, at least one, got {names[kind]}")
        for stream in self.streams:
            if not any(stream.task in model.quality for model in self.models):
                raise ValueError(f"stream {stream.name}: no model has a quality of task={stream.task}")
        used = [("models", split.model) for split in self.splits]
        used += [("places", device) for split in self.splits for device in split.devices]
        used += [pair for row in self.tensor_parallel for pair in (("models", row.model), ("places", row.place))]
        if self.map is not None:
            used += [("streams", self.map.stream), ("models", self.map.model)]
            used += [("places", self.map.first), ("places", self.map.second)]
        for kind, name in used:
            if name not in names[kind]:
                raise ValueError(f"{name!r} is none of the {kind}: {', '.join(names[kind])}")
        if self.map is not None:
            task = self.stream(self.map.stream).task
            if task not in self.model(self.map.model).quality:
                raise ValueError(f"map: model {self.map.model!r} has no quality of task={task}")
            if self.map.first == self.map.second:
                raise ValueError(f"map: first and second are both {self.map.first!r}")

    def model(self, name: str) -> ModelRow:
        return next(model for model in self.models if model.name == name)

    def place(self, name: str) -> PlaceRow:
        return next(place for place in self.places if place.name == name)

    def stream(self, name: str) -> StreamRow:
        return next(stream for stream in self.streams if stream.name == name)


def read_scenario(path: str | pathlib.Path) -> Scenario:
    """The scenario of a TOML file. Raises ValueError, in one line with the file and the place in it, for what is no
    TOML, keys that are unknown or missing, values of another type or out of range; OSError where there is no file."""
    try:
        table = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return _built(Scenario, table, "")
    except ValueError as error:  # tomllib's and a wrong encoding are ValueErrors too
        raise ValueError(f"{path}: {error}") from error


def _built(kind: type, table, where: str):
    """A dataclass from a table of the file."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table of keys")
    prefix = f"{where}: " if where else ""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = set(table) - set(fields)
    if unknown:
        raise ValueError(f"{prefix}unknown keys {', '.join(sorted(unknown))}; known are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix}missing keys {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    values = {name: _value(hints[name], value, f"{where}.{name}" if where else name) for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _value(hint, value, where: str):
    """A value as the field's type says: float takes whole numbers, a list its items one by one."""
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list")
        (item,) = typing.get_args(hint)
        return [_value(item, v, f"{where}[{_label(v, i)}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table of numbers")
        return {key: _value(float, v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _built(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    return value


def _label(value, number: int) -> str:
    """How a row of a list is called in an error: by its name, where it has one."""
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(number)
