"""Checks that the services share: what they are given is finite, in range and of one length, or one clear line says
which argument is not."""

import numpy as np


def indicators(name: str, values) -> np.ndarray:
    """bool [n] from values that are 0 or 1 (or bool). Raises ValueError for anything else, NaN among it."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype != bool and not np.isin(array, (0, 1)).all()):
        raise ValueError(f"{name} must be a list of 0 and 1, got shape {array.shape} of {array.dtype}")
    return array.astype(bool)


def vector(name: str, values) -> np.ndarray:
    """float64 [n], finite. Raises ValueError."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a list of finite numbers, got shape {array.shape}")
    return array


def unit_vector(name: str, values) -> np.ndarray:
    """float64 [n] in [0, 1]. Raises ValueError."""
    array = vector(name, values)
    if array.size and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"{name} must lie in [0, 1], got {array.min():g} to {array.max():g}")
    return array


def distributions(name: str, values) -> np.ndarray:
    """float64 [n, K], rows that are probabilities to 1e-3 or all NaN; returned with sums of exactly 1 where they are
    not NaN. Raises ValueError."""
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{name} must be [rows, classes], got shape {array.shape}")
    unknown = np.isnan(array).max(axis=1)
    known = array[~unknown]
    if known.size and (known.min() < 0 or np.abs(known.sum(axis=1) - 1).max() > 1e-3):
        raise ValueError(f"{name} must hold probabilities that sum to 1 in every row")
    return np.where(unknown[:, None], np.nan, array / array.sum(axis=1, keepdims=True))


def classes(name: str, values, num_classes: int) -> np.ndarray:
    """int64 [n] in 0..num_classes - 1. Raises ValueError."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be a list of whole numbers, got shape {array.shape} of {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= num_classes):
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def same_length(**arrays) -> int:
    """The common length. Raises ValueError that names all lengths where they differ, and where it is 0."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError("expected one length, got " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    length = next(iter(lengths.values()))
    if length == 0:
        raise ValueError(f"{next(iter(lengths))} is empty")
    return length


def share(name: str, value: float) -> None:
    """Raises ValueError unless value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raises ValueError unless every value is among the allowed ones."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name}={value}: expected one of {', '.join(allowed)}")


def positive(**values: float) -> None:
    """Raises ValueError unless every value is above 0 (NaN is not)."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def at_least(least: float, **values: float) -> None:
    """Raises ValueError unless every value is `least` or more (NaN is not)."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
