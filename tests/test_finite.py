"""NaN and infinity are refused by every configuration: all dataclasses with float fields are found, none is listed."""

import dataclasses
import importlib
import math
import pkgutil

import pytest

import fmfl_jax
from fmfl_jax.finite import finite_float


def configurations():
    """Every dataclass of fmfl_jax that has a field of type float, with the names of these fields."""
    found = {}
    for module in pkgutil.walk_packages(fmfl_jax.__path__, "fmfl_jax."):
        if module.name.startswith(("fmfl_jax.deploy.flower", "fmfl_jax.deploy.secagg_plus")):  # import flwr, not here
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not isinstance(cls, type) or cls.__name__.startswith("_"):  # of a module's own: no settings
                continue
            if dataclasses.is_dataclass(cls) and cls.__module__.startswith("fmfl_jax."):
                names = [
                    f.name for f in dataclasses.fields(cls) if "float" in str(f.type) and "Array" not in str(f.type)
                ]
                if names:
                    found[f"{cls.__module__}.{cls.__name__}"] = (cls, names)
    return found


CONFIGURATIONS = configurations()
MAY_BE_INFINITE = [
    ("Network", "deadline_s"),
    ("Network", "energy_limit_j"),
    ("Batching", "kv_tokens"),
    ("Patience", "timeout_s"),
]


def test_the_search_finds_them():
    assert len(CONFIGURATIONS) >= 16 and "fmfl_jax.experiment.config.case_study.FineTuning" in CONFIGURATIONS


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_float_field_takes_it(name, value):
    cls, names = CONFIGURATIONS[name]
    for wrong in names:
        if value == math.inf and (cls.__name__, wrong) in MAY_BE_INFINITE:
            continue
        made = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(made, field.name, value if field.name == wrong else None)
        with pytest.raises(ValueError, match=f"{wrong} must be a finite number"):
            made.__post_init__()


def test_numbers_in_text():
    assert finite_float("1e-3") == 1e-3
    for text in ("nan", "-inf", "1e999", "x"):
        with pytest.raises(ValueError):
            finite_float(text)
