"""What the sections of a configuration have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeFloat
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16"]


def absolute(uri: str) -> str:
    """A local path from the root; a URI as it is.

    Raises:
        PydanticCustomError: It would be taken for a path, and is meant to be something else.
    """
    if found := re.match(r"([a-z][a-z0-9+]+):/(?!/)", uri):
        raise PydanticCustomError("uri", f"write {found.group(1)}://")
    if "$" in uri and "://" not in uri:
        raise PydanticCustomError("uri", "variables of a shell are not replaced here: write the path")
    # Tasks and actors have working directories of their own.
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


Resources = dict[str, NonNegativeFloat]
Uri = Annotated[str, AfterValidator(absolute)]


# A label's value, its name, and the name's prefix, as Ray and Kubernetes have them.
_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?")


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def checked_range(key: str, value: Any) -> Any:
    """A number or a range, else one message in place of pydantic's for each of the two."""
    numbers = value.values() if isinstance(value, dict) and set(value) == {"min", "max"} else [value]
    if isinstance(value, Section) or all(type(number) is int and number > 0 for number in numbers):
        return value
    raise ValueError(f"{key} is {value!r}: write a number of 1 or more, or {{min: 2, max: 8}}")


def checked_labels(key: str, labels: dict[str, str]) -> dict[str, str]:
    """Labels by their one value each, or one message.

    Raises:
        ValueError: Ray would take a value for an operator, or refuse a name.
    """
    for name, value in labels.items():
        if not _LABEL.fullmatch(value):
            raise ValueError(
                f"{key}.{name} is {value!r}: write the one value that the label must have, of letters, digits, -, _ "
                "and .; Ray's operators, such as !x and in(x, y), are not taken"
            )
        if not all(_LABEL.fullmatch(part) for part in name.split("/", 1)):
            raise ValueError(
                f"{key}: {name!r} cannot be the name of a label: write names such as pool or ray.io/accelerator-type"
            )
    return labels


def refuse_set(section: Section, prefix: str, why: str, keys: Iterable[str] | None = None, but: str = "") -> None:
    """Refuses what is set though nothing would use it.

    Args:
        section: Where.
        prefix: Its key.
        why: Why nothing would, and what to do instead: `NAME is VALUE, which WHY leave NAME out`.
        keys: Which may not be set; None: all.
        but: One of all that may be.

    Raises:
        ValueError: One is.
    """
    fields = type(section).model_fields
    for name in fields if keys is None else keys:
        value = getattr(section, name)
        if name != but and value != fields[name].default:
            raise ValueError(f"{prefix}.{name} is {value!r}, which {why} leave {prefix}.{name} out")


def two_columns(key: str, columns: list[str] | None, example: str) -> list[str] | None:
    """Columns of the scores of a pair's two answers.

    Raises:
        ValueError: They are not two, or not different.
    """
    if columns is not None and (len(columns) != 2 or len(set(columns)) != 2):
        raise ValueError(
            f"{key} is {columns}: name two columns, of the chosen answer's and of the rejected one's score, e.g. "
            f"{example}"
        )
    return columns


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
