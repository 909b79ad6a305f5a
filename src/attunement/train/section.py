"""The base of every part of a recipe file: known keys only, and errors of one sentence."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from attunement.errors import AttunementError, nearest, wanted
from attunement.train.words import short


class Section(BaseModel):
    """A part of a recipe file. Frozen; an unknown key is refused with the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def read(section: type[Section], values: Mapping[str, Any], where: str) -> Any:
    """`section` made from plain data. Raises `AttunementError` for the first thing that is wrong with it."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise AttunementError(f"{where}: {_sentence(section, error)}") from None


def _sentence(section: type[Section], error: ValidationError) -> str:
    # a key that is missing may be the one that was misspelt, and that says more
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    place, owners = _walked(section, path)
    got = short(first["input"])
    if first["type"] == "extra_forbidden":
        _, around = _walked(section, path[:-1])
        known = list(around[0].model_fields) if around else []
        here = f"; known here: {', '.join(known)}" if known else ""
        return f"unknown key {place!r}{here}{nearest(path[-1], known)}"
    if first["type"] == "missing":
        return f"the key {place!r} is missing"
    if first["type"] == "union_tag_not_found":
        return f"{place} needs a key 'kind': one of {', '.join(kind for one in owners for kind in _kinds(one))}"
    if first["type"] == "union_tag_invalid":
        tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{place}.kind must be one of {', '.join(expected)}, got {tag!r}{nearest(tag, expected)}"
    if first["type"] in ("value_error", "assertion_error"):
        said = first["msg"].partition(", ")[2]
        return said if not place or said.startswith(place) else f"{place}: {said}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{place} must have keys of its own ({', '.join(owners[0].model_fields) if owners else ''}), got {got}"
    return f"{place} must be {wanted(first['msg'])}, got {got}"


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [found for argument in typing.get_args(annotation) for found in _sections(argument)]
    return []


def _values(annotation: Any) -> list[Any]:
    """What the values of a mapping are."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [found for argument in typing.get_args(annotation) for found in _values(argument)]
    return list(typing.get_args(annotation)[1:]) if typing.get_origin(annotation) is dict else []


def _kinds(section: type[Section]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _walked(section: type[Section], path: list[str]) -> tuple[str, list[type[Section]]]:
    """The place of an error as it is written in the file, and the sections that may stand there.

    pydantic puts the `kind`s of sections into its paths, which nobody wrote there.
    """
    choices: list[Any] = [section]
    written = []
    for part in path:
        sections = [found for choice in choices for found in _sections(choice)]
        if of_kind := [one for one in sections if part in _kinds(one)]:
            choices = of_kind
            continue
        written.append(part)
        fields = [one.model_fields[part].annotation for one in sections if part in one.model_fields]
        choices = [value for choice in choices for value in _values(choice)] or fields
    return ".".join(written), [found for choice in choices for found in _sections(choice)]
