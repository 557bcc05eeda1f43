"""Typed reading of `config.json`, with errors that say which field is wrong."""

from collections.abc import Mapping
from typing import Any

from slicecast.convert.errors import ConfigError


class HfConfig:
    """The fields of a Hugging Face `config.json`, or of a section of it.

    Attributes:
        values: The parsed JSON object.
        where: What error messages call it.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer field of `least` or more, or the default where it is absent or null; `ConfigError` otherwise."""
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{self.where}: field '{name}' is {value!r}; a whole number from {least} on is expected. {_REMEDY}"
            )
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer field that may be absent or null."""
        return None if self.values.get(name) is None else self.integer(name)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean field, or the default where it is absent or null; `ConfigError` otherwise."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: field '{name}' is {value!r}; true or false is expected. {_REMEDY}")
        return value

    def section(self, name: str) -> "HfConfig | None":
        """A nested object, or None where it is absent or null; `ConfigError` where it is something else."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: field '{name}' is {value!r}; an object is expected. {_REMEDY}")
        return HfConfig(value, f"{self.where}, {name}")

    def require_section(self, name: str) -> "HfConfig":
        """A nested object that must be there; `ConfigError` otherwise."""
        section = self.section(name)
        if section is None:
            raise ConfigError(f"{self.where}: field '{name}' is missing; an object is expected. {_REMEDY}")
        return section

    def with_defaults(self, defaults: Mapping[str, Any]) -> "HfConfig":
        """The same fields, and others where they are absent or null."""
        given = {name: value for name, value in self.values.items() if value is not None}
        return HfConfig({**defaults, **given}, self.where)

    def names(self, name: str, length: int) -> list[str]:
        """A list of so many names; `ConfigError` otherwise."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != length or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self.where}: field '{name}' is {value!r}; {length} names are expected. {_REMEDY}")
        return value

    def refuse(self, name: str, *accepted: object, why: str) -> None:
        """Raises `ConfigError` if a field is present with a value that the rules do not cover."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise ConfigError(f"{self.where}: field '{name}' is {value!r}, which is not supported: {why}")


_REMEDY = "Use the config.json that was published with the weights."
