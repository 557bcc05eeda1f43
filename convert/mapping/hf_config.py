"""Typed reading of `config.json`, with errors that say which field is wrong."""

from collections.abc import Mapping
from typing import Any

from slicecast.convert.errors import ConfigError
from slicecast.convert.source.safetensors_header import clip

# No axis is longer. Products of sizes then have few enough digits to be printed.
MAX_SIZE = 2**31 - 1
# Rules list every layer and every expert, so that an absurd number of them would take all memory. Published models have
# up to some 130 layers and 512 experts.
MAX_LISTED = 4096


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
        most = MAX_LISTED if name.endswith(("layers", "depth", "experts")) else MAX_SIZE
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"{self.where}: field '{name}' is {clip(value)}; a whole number from {least} to {most} is expected. "
                f"{_REMEDY}"
            )
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer field that may be absent or null."""
        return None if self.values.get(name) is None else self.integer(name)

    def quotient(self, name: str, divisor: str) -> int:
        """An integer field divided by another one; `ConfigError` if something is left over."""
        whole, left = divmod(self.integer(name), self.integer(divisor))
        if left:
            raise ConfigError(f"{self.where}: field '{name}' is no multiple of field '{divisor}'. {_REMEDY}")
        return whole

    def flag(self, name: str, default: bool) -> bool:
        """A boolean field, or the default where it is absent or null; `ConfigError` otherwise."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: field '{name}' is {clip(value)}; true or false is expected. {_REMEDY}")
        return value

    def section(self, name: str) -> "HfConfig | None":
        """A nested object, or None where it is absent or null; `ConfigError` where it is something else."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: field '{name}' is {clip(value)}; an object is expected. {_REMEDY}")
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

    def sequence(self, name: str) -> list[Any]:
        """A list, empty where it is absent or null; `ConfigError` where it is something else."""
        value = self.values.get(name)
        if not isinstance(value, list | None):
            raise ConfigError(f"{self.where}: field '{name}' is {clip(value)}; a list is expected. {_REMEDY}")
        return value or []

    def names(self, name: str, length: int) -> list[str]:
        """A list of so many names; `ConfigError` otherwise."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != length or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self.where}: field '{name}' is {clip(value)}; {length} names are expected. {_REMEDY}")
        return value

    def refuse(self, name: str, *accepted: object, why: str) -> None:
        """Raises `ConfigError` if a field is present with a value that the rules do not cover."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise ConfigError(f"{self.where}: field '{name}' is {clip(value)}, which is not supported: {why}")


_REMEDY = "Use the config.json that was published with the weights."
