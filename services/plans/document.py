"""From bytes to validated models: strict YAML and JSON reading, and error messages that an author can act on."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from services.common.errors import Code, FedmeshError

MAX_BYTES = 1 << 20
_SHOWN_ERRORS = 8
_SHOWN_CHARACTERS = 80

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Strict(BaseModel):
    """Immutable model that refuses unknown fields, NaN, infinities and silent conversions."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def require(self, condition: bool, message: str) -> Self:
        """For validators: refuse the model with `message` unless `condition` holds."""
        if not condition:
            raise PydanticCustomError("rule", "{message}", {"message": message})
        return self


Model = TypeVar("Model", bound=Strict)
Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]


def without_null(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A model's values without some that are null: fields of a later release, so that older plans keep their ids."""
    return {name: value for name, value in values.items() if name not in names or value is not None}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core scalars, no key twice, no aliases.

    YAML 1.1 reads `No` as false, `1e-6` as text and `2008-01-01` as a date; category values and privacy parameters
    must mean what they say. Aliases would let a small file grow without bound when written as JSON.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not supported here", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} must be text", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:null|~|)$", ("n", "~", "")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


def read_file(path: Path, code: Code) -> bytes:
    """The bytes of a small document.

    Raises: FedmeshError(code) when it cannot be read or is larger than MAX_BYTES.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise FedmeshError(code, f"cannot read {path.name}: {error.strerror}") from error
    return require_size(data, path.name, code)


def require_size(data: bytes, what: str, code: Code) -> bytes:
    """Raises: FedmeshError(code) when `data` is longer than MAX_BYTES."""
    if len(data) > MAX_BYTES:
        raise FedmeshError(code, f"{what} is larger than {MAX_BYTES} bytes, the limit for a document of this kind")
    return data


def parse_yaml(data: bytes, what: str, code: Code) -> dict[str, Any]:
    """A YAML mapping as plain dicts, lists and scalars.

    Raises: FedmeshError(code) saying where the document is wrong.
    """
    try:
        # _Loader derives from SafeLoader: it makes plain values only.
        value = yaml.load(data.decode("utf-8"), Loader=_Loader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise FedmeshError(code, f"{what} is not UTF-8 text") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise FedmeshError(code, f"{what} is not valid YAML{where}: {shorten(problem)}") from error
    if not isinstance(value, dict):
        raise FedmeshError(code, f"{what} must be a YAML mapping of fields, not {type(value).__name__}")
    return value


def validate(model: type[Model], value: object, what: str, code: Code) -> Model:
    """Validate plain values through JSON, so that a file and the wire obey one set of rules.

    Raises: FedmeshError(code) naming every wrong field (up to eight), its value and what is allowed.
    """
    return validate_json(model, json.dumps(value).encode(), what, code)


def validate_json(model: type[Model], data: bytes, what: str, code: Code) -> Model:
    """Like `validate`, for JSON bytes."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        # Unknown fields first: a misspelt name is also the cause of the field that seems to be missing.
        errors = sorted(
            error.errors(include_url=False, include_context=False), key=lambda item: item["type"] != "extra_forbidden"
        )
        lines = [_describe(item, model) for item in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            lines.append(f"and {len(errors) - _SHOWN_ERRORS} more")
        first = ".".join(str(part) for part in errors[0]["loc"])
        raise FedmeshError(code, f"{what} is invalid: " + "; ".join(lines), field=first) from error


def canonical_json(model: Strict) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only: equal models have equal bytes."""
    return _CANONICAL.encode(model.model_dump(mode="json")).encode()


def shorten(text: str) -> str:
    """At most 80 characters of `text`, for messages."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _describe(error: ErrorDetails, model: type[Strict]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = sorted({name for found in _models_at(model, error["loc"][:-1]) for name in found.model_fields})
        return f"unknown field {shorten(where)}; allowed: {', '.join(allowed)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] in ("rule", "missing", "json_invalid") or isinstance(error["input"], dict):
        return f"{where}: {message}" if where else message
    return f"{where} = {shorten(json.dumps(error['input'], default=str))}: {message}"


def _models_at(model: type[Strict], location: tuple[int | str, ...]) -> list[type[Strict]]:
    """The models that may stand at a location of a validation error (more than one inside a union)."""
    found = [model]
    for part in location:
        fields = [item.model_fields[part].annotation for item in found if part in item.model_fields]
        if fields:
            found = [item for annotation in fields for item in _models_in(annotation)]
        else:
            # Not a field: a position in a list, or the tag of a discriminated union.
            found = [item for item in found if isinstance(part, int) or part in _tags(item)]
    return found


def _models_in(annotation: object) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [item for argument in get_args(annotation) for item in _models_in(argument)]


def _tags(model: type[Strict]) -> tuple[object, ...]:
    """The values of the fields by which unions tell their members apart."""
    fields = [model.model_fields[name] for name in ("kind", "family") if name in model.model_fields]
    return tuple(value for field in fields for value in get_args(field.annotation))
