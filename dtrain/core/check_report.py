"""What several checks of a recipe find, so that all of it is reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dtrain.core.errors import UserError, UserErrors


@dataclass
class CheckReport:
    """The errors of several checks, and what they could not check.

    Attributes:
        errors: each with the key of the recipe and a fix.
        notes: what was left out, or not checked, and why; each once.
    """

    errors: list[UserError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, unless the report has it already."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def collect(self, key: str = "", joint: str = ": ") -> Iterator[None]:
        """Add an error of a block to the report, with the key of the recipe in front.

        Args:
            joint: between the key and where the error says it is.
        """
        try:
            yield
        except UserErrors as several:
            self.errors += several.errors
        except UserError as error:
            where = joint.join(part for part in (key, error.where) if part)
            self.errors.append(UserError(error.message, where=where, fix=error.fix))

    def raise_errors(self) -> None:
        """Raise the errors, if there are any.

        Raises:
            UserErrors: all of them.
        """
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else UserErrors(self.errors)
