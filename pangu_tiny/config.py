"""The only file that knows gin: files and bindings in, typed and checked values out.

A stage is a plain function with annotations. Its parameters are bound as `stage_name.parameter`;
a parameter that is annotated with a dataclass (ModelShape, Optimizer, Hardware) is built from the
bindings of that class, which are the same for all stages: there is one `Optimizer.learning_rate`.
gin's parser reads the grammar: literals, macros (`NAME = 1`, `%NAME`),
includes, and `%gin.REQUIRED` for what must still be given; nothing is ever called. On the command
line, where a string is wanted, what begins with % or @ is text. What is bound with a scope,
`teacher/ModelShape.depth`, counts where that model is made, see `within`.
"""

import contextlib
import dataclasses
import inspect
import pathlib
import tokenize
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pangu_tiny
from gin import config_parser  # type: ignore[attr-defined]
from pangu_tiny.errors import UserError
from pangu_tiny.typed import NO, convert, is_union, name_of


def shipped_files() -> pathlib.Path:
    """The folder of the shipped gin files, in a checkout and in an installed wheel alike."""
    package = pathlib.Path(pangu_tiny.__file__).parent
    installed = package / "shipped_gin"
    return installed if installed.is_dir() else package.parent / "gin"


class _Bound(typing.NamedTuple):
    """A value as it was read, and the file and line, or the flag, that it stands in."""

    value: Any
    origin: str


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str

    def __repr__(self) -> str:
        return f"@{self.name}"


class _Reader(config_parser.ParserDelegate):
    """Parses %macros and @references; references are refused later, since they match no type."""

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        return _Reference(scoped_configurable_name)


T = typing.TypeVar("T")
_REQUIRED = _Macro("gin.REQUIRED")
_bindings: dict[str, _Bound] = {}  # by "stage.parameter"
_scoped: dict[str, dict[str, _Bound]] = {}  # the same, by scope
_macros: dict[str, _Bound] = {}
_used: set[str] = set()  # macros that some value has named, be it overridden or not
_STORES: tuple[Any, ...] = (_bindings, _scoped, _macros, _used)


def read(
    stages: Iterable[Callable[..., Any]],
    gin_files: Sequence[str],
    bindings: Sequence[tuple[str, str]],
    scopes: Sequence[str] = (),
) -> None:
    """Reads gin files and bindings; what was read before is forgotten.

    Args:
      stages: all functions that may be bound, the likely ones first; one is asked for only when a
        name was not found before, so that it need not be imported.
      gin_files: paths, looked for in the current folder, then among the shipped files.
      bindings: (name, value) pairs that win over the files; a value that is not a gin literal of
        the type that is wanted is taken as a string, also %NAME and @NAME where a string is wanted.
      scopes: those that may stand before a name.
    """
    for store in _STORES:
        store.clear()
    known = _Known(stages, scopes)
    for path in gin_files:
        _read_file(path, known, f"--gin_file={path}", ())
    for name, value in bindings:
        _read_flag(name, value, known)
    for name, bound in _macros.items():
        if name not in _used:
            raise UserError(
                f"{bound.origin}: %{name} is used nowhere; a parameter is bound as NAME.PARAMETER"
            )


def arguments(stage: Callable[..., Any], **given: Any) -> tuple[dict[str, Any], str]:
    """The keyword arguments of a stage: what was read, under what the caller gives.

    Returns:
      The arguments, typed and checked, and the same as a gin text that gives them again.
    """
    effective: list[str] = []
    missing: list[str] = []
    values = _arguments(stage, given, effective, missing)
    if missing:
        flags = " ".join(f"--gin.{binding}=…" for binding in missing)
        raise UserError(f"{', '.join(missing)} must be given: in a gin file, or as {flags}")
    return values, "\n".join(effective) + "\n"


def is_bound(binding: str) -> bool:
    """Whether anything but `%gin.REQUIRED` was bound to `stage.parameter`."""
    bound = _bindings.get(binding)
    return bound is not None and bound.value != _REQUIRED


def build(target: type[T], *gin_files: str) -> T:
    """A dataclass from the bindings of some files, as in `build(ModelShape, "models/X.gin")`; what
    was read before is not forgotten."""

    def stage(built: Any) -> None: ...

    stage.__annotations__["built"] = target
    with _restored():
        read([stage], gin_files, [])
        return arguments(stage)[0]["built"]


def bindings_of(stages: Iterable[Callable[..., Any]], *gin_files: str) -> dict[str, Any]:
    """What some files bind without a scope, by `stage.parameter`, but for what is REQUIRED; what
    was read before is not forgotten."""
    with _restored():
        read(stages, gin_files, [])
        return {
            name: _resolve(bound.value, bound.origin)
            for name, bound in _bindings.items()
            if bound.value != _REQUIRED
        }


def origin_of(binding: str) -> str | None:
    """The file and line, or the flag, in which `stage.parameter` was bound without a scope."""
    bound = _bindings.get(binding)
    return bound and bound.origin


@contextlib.contextmanager
def within(scope: str, given: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, what was bound with this scope wins over what was bound without one, and what is
    given, by `stage.parameter`, over both."""
    with _restored():
        _bindings.update(_scoped.get(scope, {}))
        for binding, value in (given or {}).items():
            _bindings[binding] = _Bound(value, scope)
        yield


def bound_with(scope: str) -> dict[str, str]:
    """What was bound with a scope: `stage.parameter` → the file and line, or the flag."""
    return {binding: bound.origin for binding, bound in _scoped.get(scope, {}).items()}


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Forgets at the end what was read inside."""
    before = [store.copy() for store in _STORES]
    try:
        yield
    finally:
        for store, held in zip(_STORES, before, strict=True):
            store.clear()
            store.update(held)


def describe(target: Callable[..., Any]) -> list[str]:
    """A line for every parameter of a stage: its binding, type and default."""
    lines = []
    hints = typing.get_type_hints(target)
    for key, parameter in inspect.signature(target).parameters.items():
        if built := _dataclass_in(hints[key]):
            needed = "must be given"
            if is_union(hints[key]):
                needed += f", unless nothing of {built.__name__} is bound"
            lines += [line.replace("must be given", needed) for line in describe(built)]
            continue
        required = parameter.default is parameter.empty
        default = "must be given" if required else f"default {parameter.default!r}"
        lines.append(f"{target.__name__}.{key}: {name_of(hints[key])}, {default}")
    return lines


class _Known:
    """Stages and the dataclasses that they take, by name; and scopes."""

    def __init__(self, stages: Iterable[Callable[..., Any]], scopes: Sequence[str]):
        self.scopes = scopes
        self._stages = iter(stages)
        self._found: dict[str, Callable[..., Any]] = {}

    def find(self, name: str) -> Callable[..., Any] | None:
        while name not in self._found and (stage := next(self._stages, None)):
            self._found |= {stage.__name__: stage, **_dataclasses_of(stage)}
        return self._found.get(name)

    def names(self) -> list[str]:
        self.find("")
        return sorted(self._found)


def _dataclasses_of(stage: Callable[..., Any]) -> dict[str, type]:
    found = map(_dataclass_in, typing.get_type_hints(stage).values())
    return {built.__name__: built for built in found if built}


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a parameter is to be built as; it may be optional."""
    options: tuple[Any, ...] = typing.get_args(hint) if is_union(hint) else (hint,)
    built: Any = [option for option in options if dataclasses.is_dataclass(option)]
    return built[0] if built else None


def _read_file(path: str, known: _Known, origin: str, parents: tuple[str, ...]) -> None:
    """Binds all that a file and its includes bind, and remembers where each value stands."""
    found = [p for p in (pathlib.Path(path), shipped_files() / path) if p.is_file()]
    if not found:
        raise UserError(f"{origin}: no such file, here or in {shipped_files()}")
    if path in parents:
        raise UserError(f"{origin}: the file includes itself")
    try:
        for statement in _statements(found[0].read_text(encoding="utf-8")):
            line = f"{path}:{statement.location.line_num}"
            if isinstance(statement, config_parser.IncludeStatement):
                include = f"{line}: include {statement.filename!r}"
                _read_file(statement.filename, known, include, (*parents, path))
            elif isinstance(statement, config_parser.BindingStatement):
                scope, selector, parameter, value, _ = statement
                _bind(scope, selector, parameter, _Bound(value, line), known)
            elif isinstance(statement, config_parser.ImportStatement):
                raise UserError(f"{line}: only bindings and includes are allowed in a gin file")
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg.splitlines()[0]}") from error
    except tokenize.TokenError as error:
        raise UserError(f"{path}:{error.args[1][0]}: {error.args[0]}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not a text file in UTF-8") from error


def _read_flag(name: str, text: str, known: _Known) -> None:
    scoped, _, parameter = name.rpartition(".")
    scope, _, selector = (scoped or parameter).rpartition("/")
    parameter = parameter if scoped else ""
    target = known.find(selector) if parameter else None
    hint = typing.get_type_hints(target).get(parameter, Any) if target else Any
    try:
        (statement,) = _statements(f"value = {text}")
        value = statement.value
    except (SyntaxError, tokenize.TokenError, ValueError):
        value = text
    if target is None:  # the value of a macro, whose type is not known
        value = text if isinstance(value, _Reference) else value
    elif convert(value, hint) is NO and convert(text, hint) is not NO:
        value = text
    _bind(scope, selector, parameter, _Bound(value, f"--gin.{name}={text}"), known)


def _statements(text: str) -> Iterator[Any]:
    return config_parser.ConfigParser(text, _Reader())


def _bind(scope: str, selector: str, parameter: str, bound: _Bound, known: _Known) -> None:
    if scope and scope not in known.scopes:
        expected = f"one of {', '.join(known.scopes)}" if known.scopes else "none"
        raise UserError(f"{bound.origin}: unknown scope {scope!r}, expected {expected}")
    _used.update(_macros_in(bound.value))
    if not parameter:
        if scope:
            raise UserError(f"{bound.origin}: a macro has no scope, expected {selector} = VALUE")
        _macros[selector] = bound
        return
    target = known.find(selector)
    if target is None:
        names = ", ".join(known.names())
        raise UserError(f"{bound.origin}: unknown name {selector!r}, expected one of {names}")
    parameters = inspect.signature(target).parameters
    if parameter not in parameters:
        built_have = [
            f"{name}.{parameter}"
            for name, built in _dataclasses_of(target).items()
            if parameter in inspect.signature(built).parameters
        ]
        expected = " or ".join(built_have) or f"one of {', '.join(parameters)}"
        raise UserError(
            f"{bound.origin}: {selector} has no parameter {parameter!r}, expected {expected}"
        )
    if built := _dataclass_in(typing.get_type_hints(target)[parameter]):
        fields = inspect.signature(built).parameters
        raise UserError(
            f"{bound.origin}: {selector}.{parameter} cannot be bound itself, it is set by "
            f"{', '.join(f'{built.__name__}.{name}' for name in fields)}"
        )
    bindings = _scoped.setdefault(scope, {}) if scope else _bindings
    bindings[f"{selector}.{parameter}"] = bound


def _macros_in(value: Any) -> Iterator[str]:
    if isinstance(value, _Macro):
        yield value.name
    elif isinstance(value, dict):
        yield from _macros_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros_in(item)


def _resolve(value: Any, origin: str, within: tuple[_Macro, ...] = ()) -> Any:
    """The value with every macro in it replaced by what it stands for."""
    if isinstance(value, _Macro):
        if value == _REQUIRED:
            return value
        if value.name not in _macros or value in within:
            reason = "stands for itself" if value in within else "has no value"
            raise UserError(f"{origin}: %{value.name} {reason}, expected {value.name} = VALUE")
        return _resolve(_macros[value.name].value, origin, (*within, value))
    if isinstance(value, dict):
        return {
            _resolve(key, origin, within): _resolve(item, origin, within)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item, origin, within) for item in value)
    return value


def _arguments(
    target: Callable[..., Any], given: dict[str, Any], effective: list[str], missing: list[str]
) -> dict[str, Any]:
    """Fills `effective` with lines of gin, and `missing` with bindings that must be given."""
    hints = typing.get_type_hints(target)
    values: dict[str, Any] = {}
    for key, parameter in inspect.signature(target).parameters.items():
        binding = f"{target.__name__}.{key}"
        bound = _bindings.get(binding)
        if built := _dataclass_in(hints[key]):
            if is_union(hints[key]) and not _binds(built) and given.get(key) is None:
                values[key] = None
                continue
            fields = dataclasses.asdict(given[key]) if given.get(key) else {}
            count = len(missing)
            fields = _arguments(built, fields, effective, missing)
            if len(missing) == count:
                values[key] = built(**fields)
            continue
        if key in given:
            values[key] = given[key]
        elif bound and (value := _resolve(bound.value, bound.origin)) != _REQUIRED:
            values[key] = _typed(value, hints[key], f"{bound.origin}: {binding}")
        elif bound or parameter.default is parameter.empty:
            missing.append(binding)
            continue
        effective.append(f"{binding} = {values.get(key, parameter.default)!r}")
    return values


def _binds(target: type) -> bool:
    """Whether anything was bound for it."""
    return any(name.startswith(f"{target.__name__}.") for name in _bindings)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as `hint` wants it; an int passes for a float, and 1e6 for an int."""
    converted = convert(value, hint)
    if converted is NO:
        raise UserError(f"{where} = {value!r}: expected {name_of(hint)}")
    return converted
