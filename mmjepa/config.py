"""Configs: YAML in, validated dataclasses out. An unknown key is refused with the nearest known one."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmjepa.refusal import Refusal

Config = TypeVar("Config")


def load_yaml(path: Path | str, named_in: Path | None = None) -> dict[str, Any]:
    """Read a run's YAML. ``base: other.yaml`` (relative to the file), at the top or in any mapping, starts from another file
    and states only what differs; lists are replaced whole. named_in: the file whose base this is, for the message."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(
            "CONFIG_MISSING",
            f"{path} is not a file" + (f" (the base that {named_in} names)" if named_in else ""),
            "A base lies relative to the file that names it"
            if named_in
            else "Name a YAML config, for instance one of recipes/configs/",
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal("CONFIG_BROKEN", f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise Refusal("CONFIG_BROKEN", f"{path} holds a {type(values).__name__}, want key: value lines")
    return _based(values, path)


def _based(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    own = {k: _based(v, path) if isinstance(v, Mapping) else v for k, v in values.items() if k != "base"}
    return own if "base" not in values else merge(load_yaml(path.parent / str(values["base"]), path), own)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mappings merged key by key; one that states another ``kind`` than ``base`` does replaces it."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _kinds_differ(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _kinds_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in old and "kind" in new and old["kind"] != new["kind"]


def override(values: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Lay ``key=value`` or ``a.b=value`` arguments (values are YAML) on a config."""
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign or not key:
            raise Refusal(
                "CONFIG_ARGUMENT", f"'{argument}' is not key=value", "Write for instance seed=1 or optim.lr=1e-4"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise Refusal("CONFIG_ARGUMENT", f"the value in '{argument}' is not valid YAML") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return dict(values)


def build(kind: type[Config], values: Mapping[str, Any] | None, where: str = "") -> Config:
    """Make the dataclass ``kind`` from plain values, recursing into nested dataclasses and tuples of them.

    Raises Refusal: ``CONFIG_UNKNOWN_KEY`` (names the nearest key), ``CONFIG_TYPE``, ``CONFIG_REQUIRED``, ``CONFIG_VALUE``.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise Refusal("CONFIG_TYPE", f"{where or kind.__name__} is {values!r}, want key: value pairs")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise Refusal(
                "CONFIG_UNKNOWN_KEY",
                f"unknown key '{prefix}{key}'",
                f"The nearest known key is '{prefix}{near[0]}'" if near else "This part takes no keys",
            )
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Refusal(
                "CONFIG_REQUIRED",
                f"'{prefix}{name}' is not set",
                f"Add it to the config or write {prefix}{name}=... on the command line",
            )
    made = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise Refusal("CONFIG_VALUE", f"{where or 'config'}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise Refusal("CONFIG_VALUE", f"'{where}' is {value!r}, want one of {', '.join(map(repr, arguments))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise Refusal("CONFIG_TYPE", f"'{where}' is {value!r}, want a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise Refusal("CONFIG_TYPE", f"'{where}' has {len(value)} entries, want {len(kinds)}")
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise Refusal("CONFIG_TYPE", f"'{where}' is {value!r}, want key: value pairs")
        if arguments[1] in (float, int, str):  # `a.b=1` on the command line means the key `a.b` here
            value = _dotted(value)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    refusal: Refusal | None = None
    for argument in _tagged(arguments, value):
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, where)
        except Refusal as error:
            # a mapping that names an unknown key was meant for the dataclass: its message is the useful one
            refusal = error if refusal is None or error.code == "CONFIG_UNKNOWN_KEY" else refusal
    assert refusal is not None
    raise refusal


def _tagged(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Of several dataclasses with a literal field ``kind``, the one whose kind the value names; where it names none, the
    one that knows the most of its keys, the first of equals."""
    if not isinstance(value, Mapping):
        return arguments
    kinds = {a: typing.get_args(typing.get_type_hints(a).get("kind")) for a in arguments if dataclasses.is_dataclass(a)}
    if "kind" in value:
        chosen = tuple(argument for argument, names in kinds.items() if value["kind"] in names)
        if any(kinds.values()) and not chosen:
            known = ", ".join(repr(name) for names in kinds.values() for name in names)
            raise Refusal("CONFIG_VALUE", f"kind is {value['kind']!r}, want one of {known}")
        return chosen or arguments
    if len(tagged := [a for a in kinds if kinds[a]]) > 1:
        return (max(tagged, key=lambda a: sum(field.name in value for field in dataclasses.fields(a))),)
    return arguments


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise Refusal("CONFIG_TYPE", f"'{where}' is {value!r}, want {getattr(hint, '__name__', hint)}")


def to_plain(config: Any) -> Any:
    """The config as plain values that ``yaml.safe_dump`` writes and ``build`` reads back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def resolved_yaml(config: Any) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)
