"""Names of configured methods, and methods of names: "trimmed_mean:0.2", "qsgd:4,coding=elias"."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


def name_of(method: object, registry: Mapping[str, Callable[..., Any]]) -> str:
    """The name that the registry has for the method's class."""
    return next(name for name, made in registry.items() if made is type(method))


def parse_method(kind: str, spec: str, registry: Mapping[str, Callable[..., Any]]) -> Any:
    """The method that "NAME", "NAME:VALUE" or "NAME:VALUE,FIELD=VALUE,..." names: values without a field's name are the
    fields in their order.

    Raises ValueError, naming `kind`, for a name that the registry has not, for fields that the method has not or lacks,
    and for values that its fields cannot take.
    """
    name, _, rest = spec.partition(":")
    if name not in registry:
        raise ValueError(f"{kind}={spec}: expected one of {', '.join(registry)}")
    made = registry[name]
    fields = {field.name: field for field in dataclasses.fields(made)}  # pyright: ignore[reportArgumentType]
    expected = name + (":" + ",".join(fields) if fields else "")
    types_of, values = typing.get_type_hints(made), {}
    for place, part in enumerate(rest.split(",") if rest else []):
        field, equals, value = part.partition("=")
        if not equals:
            field, value = (list(fields) + [None] * (place + 1))[place], part
        if field not in fields or field in values:
            raise ValueError(f"{kind}={spec}: expected {expected}")
        values[field] = _value(kind, spec, expected, types_of[field], value)
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"{kind}={spec}: expected {expected}")
    try:
        return made(**values)
    except ValueError as error:
        raise ValueError(f"{kind}={spec}: {error}") from None


def _value(kind: str, spec: str, expected: str, annotation: Any, text: str) -> Any:
    """`text` as the first of the annotation's types that takes it."""
    for choice in _choices(annotation):
        if choice is bool and text in ("true", "false"):
            return text == "true"
        if choice in (int, float):
            try:
                return choice(text)
            except ValueError:
                continue
        if choice == text:
            return text
    raise ValueError(f"{kind}={spec}: {text!r} is no value for {expected}")


def _choices(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    if origin in (types.UnionType, typing.Union):
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    return [annotation]
