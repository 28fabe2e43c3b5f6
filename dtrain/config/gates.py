"""Gates: limits on what a stage may make worse."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dtrain.config.group import Group, Text

Limit = Annotated[float, Field(ge=0)]


class Gate(Group):
    """How much worse than the base model a set or a task may become in any stage."""

    metric: Text | None = Field(
        None,
        description="`loss`, or a metric that the set or task reports, such as `accuracy`; "
        "default: the loss of a set, the first metric of a task",
    )
    max_increase: Limit | None = Field(None, description="largest increase, as of a loss")
    max_drop: Limit | None = Field(None, description="largest decrease, as of an accuracy")

    @model_validator(mode="after")
    def _has_one_limit(self) -> Gate:
        if (self.max_increase is None) == (self.max_drop is None):
            raise ValueError("set one of max_increase and max_drop")
        return self

    def excess(self, before: float, after: float) -> float:
        """How much a change exceeds the limit by; negative if it does not."""
        if self.max_drop is not None:
            return before - after - self.max_drop
        assert self.max_increase is not None
        return after - before - self.max_increase
