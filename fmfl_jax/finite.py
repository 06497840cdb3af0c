"""Numbers that settings are made of: finite, unless a field says otherwise. NaN passes every range check written as
"x < 0 is wrong", so it is refused in one place, before any other check."""

import dataclasses
import functools
import math

import numpy as np


def finite_fields(cls=None, *, may_be_infinite: tuple[str, ...] = ()):
    """Class decorator, under @dataclasses.dataclass: no float of an instance is NaN, nor infinite unless its field is
    in may_be_infinite. Floats in tuples count too.

    The check comes before the class's own __post_init__. Raises ValueError that names the field.
    """
    if cls is None:
        return functools.partial(finite_fields, may_be_infinite=may_be_infinite)
    own_check = cls.__dict__.get("__post_init__")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (float, np.floating)) and not math.isfinite(number):
                    if math.isnan(number) or field.name not in may_be_infinite:
                        raise ValueError(f"{field.name} must be a finite number, got {number}")
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = __post_init__
    return cls


def finite_float(text: str) -> float:
    """The number that `text` spells. Raises ValueError for anything else, NaN and infinity among it."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text}")
    return number
