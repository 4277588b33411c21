"""Values from outside, as annotations want them."""

import types
import typing
from typing import Any

NO = object()
"""What `convert` returns for a value that is of another type."""


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def convert(value: Any, hint: Any) -> Any:
    """The value as `hint` wants it (an int passes for a float, and 1e6 for an int), or `NO`."""
    if hint is Any:
        return value
    if is_union(hint):
        options = (convert(value, option) for option in typing.get_args(hint))
        return next((option for option in options if option is not NO), NO)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list | tuple):
        items = [convert(item, inner[0]) for item in value]
        return NO if NO in items else items
    if origin is dict and isinstance(value, dict):
        keys = [convert(key, inner[0]) for key in value]
        values = [convert(item, inner[1]) for item in value.values()]
        return NO if NO in keys + values else dict(zip(keys, values, strict=True))
    if hint is types.NoneType:
        return value if value is None else NO
    if isinstance(value, bool) or origin:
        return value if hint is bool else NO
    if hint is float and isinstance(value, int):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, hint) else NO


def name_of(hint: Any) -> str:
    return str(hint) if typing.get_origin(hint) or is_union(hint) else hint.__name__
