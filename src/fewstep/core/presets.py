"""Settings that go by a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self


class Presets:
    """What has named settings beside its defaults.

    Attributes:
        presets: fields by the name of the settings.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the settings called `name`, some of them overridden; ValueError for an unknown name."""
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(cls.presets) or 'none'}")
        return cls(**{**cls.presets[name], **overrides})
