"""Files of a run that are written whole or not at all: config.json, metrics.jsonl."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax


def claim(directory: str | pathlib.Path, settings: dict) -> None:
    """Writes config.json into a new folder.

    Raises ValueError if the folder holds a run with other settings: its results would be mixed up with this one's.
    """
    path = pathlib.Path(directory) / "config.json"
    settings = json.loads(json.dumps(settings))  # as it reads back: lists for tuples
    if not path.exists():
        write_json(path, settings)
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings | held if settings.get(name) != held.get(name)]
    if differing:
        raise ValueError(
            f"{directory} holds a run with other settings ({', '.join(differing)}): choose another --out, or remove it"
        )


def settings_of(config: Any) -> Any:
    """A configuration as plain values, every dataclass with its name: two methods without numbers are not the same."""
    if dataclasses.is_dataclass(config):
        values = {field.name: settings_of(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"is": type(config).__name__} | values
    if isinstance(config, dict):
        return {name: settings_of(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [settings_of(value) for value in config]
    return config


def write_json(path: pathlib.Path, value) -> None:
    """Replaces the file in one step; of several processes the first writes."""
    _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_history(directory: pathlib.Path, *, up_to_round: int) -> list[dict]:
    """The rounds of directory/metrics.jsonl that the checkpoint of up_to_round knows."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["round"] <= up_to_round]


def write_history(directory: pathlib.Path, history: list[dict]) -> None:
    """Replaces directory/metrics.jsonl in one step; of several processes the first writes."""
    _replace(
        directory / "metrics.jsonl", "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in history)
    )


def _finite(value):
    """`value` with null for every float that is not finite: JSON has no NaN, and many readers refuse it."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: pathlib.Path, text: str) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
