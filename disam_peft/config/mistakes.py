"""What pydantic found wrong with a file, in sentences about the keys of that file.

pydantic's locations name more than keys: the chosen kind of a discriminated union, and the members of a plain union
one after the other. ``explain`` follows a location through the types of the config, whatever unions it has, and says
where the mistake stands, what is wrong, and which known name is nearest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag, ValidationError
from pydantic.fields import FieldInfo

from disam_peft.errors import did_you_mean

# What pydantic calls a value of the wrong type, and how the expected type is named here.
_EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each mistake that validation by ``model`` found."""
    lines: list[str] = []
    of_unions: dict[tuple[str, ...], dict[str, list[_Mistake]]] = {}
    for details in error.errors(include_url=False):
        mistake = _Mistake(details, _follow(model, details["loc"]))
        if mistake.place.union is None:
            lines.append(mistake.sentence())
        else:
            of_unions.setdefault(mistake.place.union, {}).setdefault(mistake.place.member, []).append(mistake)
    for union in of_unions.values():
        lines += _explain_union(list(union.values()))
    return lines


def keys_of(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys of the file that one of pydantic's locations leads to."""
    return _follow(model, location).keys


def all_mistakes(mistakes: Sequence[str], where: str) -> str:
    """One message for all mistakes of a file."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return "\n  ".join([f"{count} in {where}:", *mistakes])


@dataclass
class _Place:
    """Where a location leads: to the keys of the file, without the names of kinds and of members of unions."""

    keys: list[str] = field(default_factory=list)
    holder: type[BaseModel] | None = None
    """The config in which the last key stands; None where it stands in a list or a mapping of free names."""
    choices: tuple[Any, ...] = ()
    """The members of the discriminated union at the end of the location, or the config that stands there alone."""
    union: tuple[str, ...] | None = None
    """The keys of the plain union that the location passes through."""
    member: str = ""
    """Which member of that union refuses the value, as pydantic calls it."""


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors, and where it stands."""

    details: Any
    place: _Place

    @property
    def is_another_type(self) -> bool:
        """Whether a member of a union refuses the type of the whole value, and not something inside it."""
        kind = self.details["type"]
        return tuple(self.place.keys) == self.place.union and (kind in _EXPECTED or kind == "literal_error")

    @property
    def expected(self) -> str:
        return _EXPECTED.get(self.details["type"]) or self.details["msg"].removeprefix("Input should be ")

    def sentence(self) -> str:
        kind, place = self.details["type"], self.place
        if kind == "invalid_key" or self.details["loc"][-1:] == ("[key]",):
            where = ".".join(place.keys[:-1]) or "at the top"
            return f"{where}: the name {self.details['input']!r} is no text; put it in quotes"
        where = ".".join(place.keys) or "recipe"
        if kind == "extra_forbidden":
            known = _keys_of(place.holder) if place.holder is not None else []
            return f"{where}: unknown key{did_you_mean(place.keys[-1], known)} (known: {', '.join(known)})"
        if kind == "union_tag_invalid":
            return _unknown_kind(f"{where}.{_plain(self.details['ctx']['discriminator'])}", self.details["ctx"], place)
        if kind == "union_tag_not_found":
            kinds = ", ".join(_kinds(place.choices))
            return f"{where}.{_plain(self.details['ctx']['discriminator'])}: Field required (one of {kinds})"
        if kind == "missing" and where == "protocol":
            return "protocol: name the domain to hold out, protocol.held_out=DOMAIN, or train on all, protocol=all"
        message = self.details["msg"].removeprefix("Value error, ")
        if not place.keys and re.match(r"(name|method\.\w+): ", message):  # of a setting that needs the whole recipe
            return message
        if kind in ("model_type", "model_attributes_type"):
            message = "Input should be keys and values"
        one_choice = kind == "literal_error" and len(_quoted(self.details["ctx"]["expected"])) == 1
        near = "" if one_choice else self._nearest()  # the message names the only choice already
        return f"{where}: {message}{near}{self._given()}"

    def _nearest(self) -> str:
        given = self.details.get("input")
        if self.details["type"] != "literal_error" or not isinstance(given, str):
            return ""
        return did_you_mean(given, _quoted(self.details["ctx"]["expected"]))

    def _given(self) -> str:
        given = self.details.get("input")
        if isinstance(given, (dict, BaseModel)) or self.details["type"] == "missing":
            return ""
        text = repr(given)
        return f" (given: {text if len(text) <= 200 else f'{text[:200]}...'})"


def _explain_union(members: list[list[_Mistake]]) -> list[str]:
    """What is wrong with a value that no member of a plain union takes. Where some member has the right type, its
    complaints are the ones that help; otherwise all types that are expected are named together."""
    of_the_type = [mistakes for mistakes in members if not all(mistake.is_another_type for mistake in mistakes)]
    if of_the_type:
        return [mistake.sentence() for mistakes in of_the_type for mistake in mistakes]
    first = members[0][0]
    expected = list(dict.fromkeys(mistakes[0].expected for mistakes in members))
    named = " or ".join([*([", ".join(expected[:-1])] if len(expected) > 1 else []), expected[-1]])
    near = "".join(mistakes[0]._nearest() for mistakes in members)
    return [f"{'.'.join(first.place.keys)}: Input should be {named}{near}{first._given()}"]


def _unknown_kind(where: str, context: Mapping[str, Any], place: _Place) -> str:
    given, known = context["tag"], _quoted(context["expected_tags"])
    other = next((names[given] for names in map(_other_names, place.choices) if given in names), None)
    hint = f"; write {{{other}}}" if other is not None else did_you_mean(given, known)
    return f"{where}: {given!r} is none of {context['expected_tags']}{hint}"


def _follow(model: type[BaseModel], location: Sequence[str | int]) -> _Place:
    """Walk along a location of pydantic's, from the config ``model`` on."""
    place = _Place()
    annotation, discriminator = _unwrapped(model)
    for part in location:
        if part == "[key]":  # the key before is itself the mistake
            continue
        if _is_union(annotation):
            members = get_args(annotation)
            if discriminator is not None:
                chosen = next((member for member in members if _is_chosen(member, discriminator, part)), None)
            else:
                if place.union is None:
                    place.union, place.member = tuple(place.keys), str(part)
                chosen = next((member for member in members if _is_called(member, str(part))), None)
            annotation, discriminator = _unwrapped(chosen)
            continue
        place.keys.append(str(part))
        place.holder = None
        inner: Any = None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            place.holder = annotation
            inner = annotation.model_fields.get(str(part))
        elif get_origin(annotation) in (list, tuple, dict):
            inner = get_args(annotation)[-1] if get_origin(annotation) is dict else get_args(annotation)[0]
        annotation, discriminator = _unwrapped(inner)
    if _is_union(annotation):
        place.choices = get_args(annotation) if discriminator is not None else ()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        place.choices = (annotation,)
    return place


def _unwrapped(annotation: Any) -> tuple[Any, str | Discriminator | None]:
    """The type without ``Annotated`` and ``| None``, and by what a union of it is told apart."""
    discriminator: str | Discriminator | None = None
    while True:
        metadata: Sequence[Any] = ()
        if isinstance(annotation, FieldInfo):
            metadata = [annotation, *annotation.metadata]
            annotation = annotation.annotation
        elif get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
        for item in metadata:
            if isinstance(item, Discriminator):
                discriminator = item
            elif isinstance(item, FieldInfo) and item.discriminator is not None:
                discriminator = item.discriminator
        members = [member for member in get_args(annotation) if member is not NoneType]
        if _is_union(annotation) and len(members) == 1:
            annotation = members[0]
        elif get_origin(annotation) is not Annotated:
            return annotation, discriminator


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _is_chosen(member: Any, discriminator: str | Discriminator, tag: str | int) -> bool:
    if isinstance(discriminator, Discriminator) and not isinstance(discriminator.discriminator, str):
        metadata = get_args(member)[1:] if get_origin(member) is Annotated else ()
        return any(isinstance(item, Tag) and item.tag == tag for item in metadata)
    return tag in _kind_of(member)


def _is_called(member: Any, label: str) -> bool:
    """Whether this is the member of a plain union that pydantic calls by this name."""
    annotation, _ = _unwrapped(member)
    origin = get_origin(annotation)
    if _is_union(annotation):
        # a validator before it is part of the name: function-before[with_kind(), tagged-union[...]]
        return label.startswith(("tagged-union[", "union[")) or ", tagged-union[" in label
    if origin in (list, tuple, dict):
        return label.startswith(f"{origin.__name__}[")
    return isinstance(annotation, type) and annotation.__name__ == label


def _kind_of(member: Any) -> tuple[str, ...]:
    """The values of ``kind`` that a member of a discriminated union stands for."""
    annotation, _ = _unwrapped(member)
    is_config = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    kind = annotation.model_fields.get("kind") if is_config else None
    return get_args(kind.annotation) if kind is not None and get_origin(kind.annotation) is Literal else ()


def _kinds(members: Sequence[Any]) -> list[str]:
    return [kind for member in members for kind in _kind_of(member)]


def _other_names(member: Any) -> Mapping[str, str]:
    annotation, _ = _unwrapped(member)
    return getattr(annotation, "other_names", {})


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _plain(text: str) -> str:
    return text.strip("'")


def _keys_of(config: type[BaseModel]) -> list[str]:
    """The keys of a config as a file has them."""
    return sorted(field.alias or name for name, field in config.model_fields.items())
