"""The base of the small frozen dataclasses that hold a method's settings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Self


class Settings:
    """Base of a frozen dataclass whose fields are settings; `dataclasses.asdict` stores it."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of its fields in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, values: Mapping) -> Self:
        """The settings that `values` holds beside others, such as those of a stored run."""
        return cls(**{name: values[name] for name in cls.names() if name in values})
