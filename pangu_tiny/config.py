"""The only file that knows gin: files and bindings in, typed and checked values out.

A stage is a plain function with annotations. Its parameters are bound as `stage_name.parameter`;
a parameter that is annotated with a dataclass (ModelShape, Optimizer, Hardware) is built from the
bindings of that class. gin parses and keeps the bindings; it never calls anything.
"""

import dataclasses
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin
import pangu_tiny
from gin import config_parser
from pangu_tiny.errors import UserError


def shipped_files() -> pathlib.Path:
    """The folder of the shipped gin files, in a checkout and in an installed wheel alike."""
    package = pathlib.Path(pangu_tiny.__file__).parent
    installed = package / "shipped_gin"
    return installed if installed.is_dir() else package.parent / "gin"


_ORIGINS: dict[tuple[str, str], str] = {}
"""(configurable, parameter) → the file and line, or the flag, that bound it last."""


def read(
    stages: Iterable[Callable[..., Any]],
    gin_files: Sequence[str],
    bindings: Sequence[tuple[str, str]],
) -> None:
    """Reads gin files and bindings; what was read before is forgotten.

    Args:
      stages: all functions that may be bound.
      gin_files: paths, looked for in the current folder, then among the shipped files.
      bindings: (name, value) pairs that win over the files; a value that is not a gin literal is
        taken as a string.

    Raises:
      UserError: names the file or flag, what was found and what was expected.
    """
    gin.clear_config()
    _ORIGINS.clear()
    known = {}
    for stage in stages:
        known |= {stage.__name__: stage, **_dataclasses_of(stage)}
    with gin.config.interactive_mode():  # which lets a name be registered again
        for name, target in known.items():
            gin.external_configurable(target, name=name, module="pangu_tiny")
    for path in gin_files:
        _parse_file(path, known)
    for name, value in bindings:
        _parse_flag(name, value, known)


def arguments(stage: Callable[..., Any], **given: Any) -> tuple[dict[str, Any], str]:
    """The keyword arguments of a stage: what was read, under what the caller gives.

    Returns:
      The arguments, typed and checked, and the same as a gin text that gives them again.

    Raises:
      UserError: names the binding, where it stands, what was found and what was expected.
    """
    effective: list[str] = []
    values = _arguments(stage, given, effective)
    return values, "\n".join(effective) + "\n"


def _dataclasses_of(stage: Callable[..., Any]) -> dict[str, type]:
    hints = typing.get_type_hints(stage)
    return {hint.__name__: hint for hint in hints.values() if dataclasses.is_dataclass(hint)}


def _parse_file(path: str, known: dict[str, Any]) -> None:
    """Binds all that a file and its includes bind, and remembers where each value stands."""
    found = [p for p in (pathlib.Path(path), shipped_files() / path) if p.is_file()]
    if not found:
        raise UserError(f"--gin_file={path}: no such file, here or in {shipped_files()}")
    try:
        for statement in _statements(found[0].read_text()):
            line = f"{path}:{statement.location.line_num}"
            if isinstance(statement, config_parser.IncludeStatement):
                _parse_file(statement.filename, known)
            elif isinstance(statement, config_parser.BindingStatement):
                _bind(statement, line, known)
            else:
                raise UserError(f"{line}: only bindings and includes are allowed in a gin file")
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error


def _parse_flag(name: str, value: str, known: dict[str, Any]) -> None:
    flag = f"--gin.{name}={value}"
    if not value.startswith(("%", "'", '"')) and _is_text(name, value, known):
        value = repr(value)
    try:
        for statement in _statements(f"{name} = {value}"):
            _bind(statement, flag, known)
    except SyntaxError as error:
        raise UserError(f"{flag}: {error.msg}; expected --gin.NAME.PARAMETER=VALUE") from error


def _statements(text: str) -> config_parser.ConfigParser:
    return config_parser.ConfigParser(text, gin.config.ParserDelegate())


def _is_text(name: str, value: str, known: dict[str, Any]) -> bool:
    """Whether a value on the command line is to be taken as it stands, without quotes."""
    owner, _, parameter = name.rpartition(".")
    if target := known.get(owner):
        hint = typing.get_type_hints(target).get(parameter)
        if hint is str or (value != "None" and hint == str | None):
            return True
    try:
        gin.config.parse_value(value)
    except (SyntaxError, ValueError):
        return True
    return False


def _bind(statement: config_parser.BindingStatement, origin: str, known: dict[str, Any]) -> None:
    scope, selector, parameter, value, _ = statement
    if not parameter:  # a macro: NAME = value
        gin.bind_parameter((f"{scope}/{selector}".lstrip("/"), "gin.macro", "value"), value)
        return
    if selector not in known:
        names = ", ".join(sorted(known))
        raise UserError(f"{origin}: unknown name {selector!r}, expected one of {names}")
    parameters = inspect.signature(known[selector]).parameters
    if parameter not in parameters:
        raise UserError(
            f"{origin}: {selector} has no parameter {parameter!r}, "
            f"expected one of {', '.join(parameters)}"
        )
    gin.bind_parameter((scope, selector, parameter), value)
    _ORIGINS[(selector, parameter)] = origin


def _arguments(
    target: Callable[..., Any], given: dict[str, Any], effective: list[str]
) -> dict[str, Any]:
    name = target.__name__
    try:
        bound = gin.get_bindings(name)
    except ValueError as error:  # a macro without a value
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    bound = {key: value for key, value in bound.items() if value is not gin.REQUIRED}
    hints = typing.get_type_hints(target)
    values, missing = {}, []
    for key, parameter in inspect.signature(target).parameters.items():
        binding = f"{name}.{key}"
        if dataclasses.is_dataclass(hints[key]) and key not in given:
            values[key] = hints[key](**_arguments(hints[key], {}, effective))
            continue
        if key in given:
            values[key] = given[key]
        elif key in bound:
            origin = _ORIGINS.get((name, key), name)
            values[key] = _typed(bound[key], hints[key], f"{origin}: {binding}")
        elif parameter.default is parameter.empty:
            missing.append(binding)
            continue
        effective.append(f"{binding} = {values.get(key, parameter.default)!r}")
    if missing:
        flags = " ".join(f"--gin.{binding}=…" for binding in missing)
        raise UserError(f"{', '.join(missing)} must be given: in a gin file, or as {flags}")
    return values


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as `hint` wants it; an int passes for a float, and 1e6 for an int."""
    converted = _convert(value, hint)
    if converted is _NO:
        expected = str(hint) if typing.get_origin(hint) or _is_union(hint) else hint.__name__
        raise UserError(f"{where} = {value!r}: expected {expected}")
    return converted


_NO = object()


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _convert(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if _is_union(hint):
        options = (_convert(value, option) for option in typing.get_args(hint))
        return next((option for option in options if option is not _NO), _NO)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list | tuple):
        items = [_convert(item, inner[0]) for item in value]
        return _NO if _NO in items else items
    if origin is dict and isinstance(value, dict):
        keys = [_convert(key, inner[0]) for key in value]
        values = [_convert(item, inner[1]) for item in value.values()]
        return _NO if _NO in keys + values else dict(zip(keys, values, strict=True))
    if hint is types.NoneType:
        return value if value is None else _NO
    if isinstance(value, bool) or origin:
        return value if hint is bool else _NO
    if hint is float and isinstance(value, int):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, hint) else _NO
