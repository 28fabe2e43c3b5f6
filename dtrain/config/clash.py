"""An error in a combination of keys."""

from __future__ import annotations

from dtrain.config.yaml_document import Key, dotted
from dtrain.core.errors import UserError


class Clash(UserError):
    """An error in a combination of keys."""

    def __init__(self, keys: list[Key], message: str, fix: str = "") -> None:
        self.keys = keys
        names = " and ".join(dotted(key) for key in keys)
        super().__init__(f"{names}: {message}", fix=fix)
