"""Settings with a fixed list of choices, checked where a config is made in Python too, not only where one is read."""

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any) -> None:
    """Raise ValueError where a field of a dataclass typed as a Literal holds none of its choices."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            known = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name} is {getattr(config, name)!r}, want one of {known}")
