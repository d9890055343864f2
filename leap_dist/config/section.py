"""What the parts of a job file are made of: a strict, frozen base class, and the words of its errors."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from leap_dist.files import user_path
from leap_dist.secrets import hide_in, hide_secrets

Conflict = tuple[str, str]
"""A key (relative to its section, "" for the section itself) and what is wrong about it."""


def nearest(value: Any, choices: Iterable[Any], prefix: str = "") -> str:
    """ "; did you mean ...?", or nothing when no choice is near."""
    names = [choice for choice in choices if isinstance(choice, str)]
    near = get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def show(value: Any) -> str:
    """A received value as it stands in the file, without secrets, shortened."""
    text = hide_secrets(json.dumps(hide_in(value), default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def as_tuple(value: Any) -> Any:
    """A JSON list, or one plain string, as the tuple that a field stores."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def as_objects(value: Any) -> Any:
    """The same where an item may be a JSON object."""
    return (value,) if isinstance(value, Mapping) else as_tuple(value)


def with_home(value: str | None) -> str | None:
    """The value with the home folder in place of "~" where it begins a path, in "sqlite:///~/mlflow.db" too."""
    scheme, slashes, path = value.rpartition(":///") if value and ":///~" in value else ("", "", value)
    return f"{scheme}{slashes}{user_path(path)}" if path and path.startswith("~") else value


def _tensor_pattern(value: str) -> str:
    """A tensor name, or "re:" and a pattern that compiles."""
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            why = f"not a regular expression: {error}"
            raise PydanticCustomError("pattern", "{why}", {"why": why}) from error
    return value


Patterns = Annotated[tuple[Annotated[str, AfterValidator(_tensor_pattern)], ...], BeforeValidator(as_tuple)]
PositiveFloat = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
FP32_TINY, FP32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


# pydantic warns of a field whose name is also a method of ABCMeta, which is no concern of a section
warnings.filterwarnings("ignore", r'Field name "register" in "TrackingConfig" shadows', UserWarning)


class Section(BaseModel):
    """A part of the job file. Each field's description says what is allowed; the error messages print it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        """Combinations of keys that cannot be; `raw` may hold values of any type."""
        return []

    @field_validator("*")
    @classmethod
    def _held_by_fp32(cls, value: Any) -> Any:
        """Steps are computed in fp32, where 1e39 is infinite and 1e-46 is 0."""
        if isinstance(value, float) and value != 0 and not FP32_TINY <= abs(value) <= FP32_MAX:
            why = f"fp32 holds {FP32_TINY:.2g} to {FP32_MAX:.2g}"
            raise PydanticCustomError("fp32", "{why}", {"why": why})
        return value

    @model_validator(mode="after")
    def _no_conflicts(self) -> Section:
        for key, problem in self.conflicts(self.model_dump()):
            raise PydanticCustomError("conflict", "{text}", {"text": f"{key}: {problem}"})
        return self
