"""Fitted forms on disk: one JSON with a version and the hash of its content; what is not the form that was fitted is refused."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from mmjepa.files import read_json, write_json
from mmjepa.refusal import Refusal


class Form(ABC):
    """What a fitted form shares: plain JSON content, which holds its ``kind`` and ``version``, and the hash of it."""

    @abstractmethod
    def _content(self) -> dict[str, Any]: ...

    @property
    def hash(self) -> str:
        """Hash of everything fitted."""
        return _hash(self._content())

    def save(self, path: Path | str) -> None:
        """Write the JSON, with its hash."""
        content = self._content()
        write_json(path, {"hash": _hash(content)} | content)


def load_form(path: Path | str, kind: str, version: int, expected: str | None = None) -> dict[str, Any]:
    """Read a form's content back. expected: the hash that it must have, for instance the one a model was trained with.

    Raises Refusal: FILE_MISSING, FILE_BROKEN, FORM_BROKEN (no form of this kind), FORM_VERSION, FORM_HASH.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != kind or "hash" not in content:
        raise Refusal("FORM_BROKEN", f"{path} holds no form of the kind '{kind}'", "Name the file that fitting wrote")
    if content.get("version") != version:
        raise Refusal("FORM_VERSION", f"{path} is of another version than {version}", "Fit the form again")
    found = content.pop("hash")
    if found != _hash(content) or expected not in (None, found):
        raise Refusal(
            "FORM_HASH", f"{path} is not the form that was fitted", "Use the one that the model was trained with"
        )
    return content


def _hash(content: dict[str, Any]) -> str:
    """Hex sha256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
