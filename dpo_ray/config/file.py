"""Configuration files: read with one message for all that is wrong, written, and the template."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dpo_ray.config.base import Section
from dpo_ray.config.run import Config
from dpo_ray.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number, as YAML 1.2 has it, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: It is none, or has a key twice.
    """
    return yaml.load(text, _Loader)


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides.

    Args:
        path: A local YAML file.
        overrides: Each `section.key=value`, the value in YAML.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not describe a run.
    """
    try:
        with open(path, encoding="utf-8") as file:
            raw = read_yaml(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections; `dpo-ray config --template` prints one")
    apply_overrides(raw, overrides or [])
    return parse_config(raw, source=path)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets keys of a mapping.

    Args:
        raw: Sections; changed in place.
        overrides: Each `section.key=value`, the value in YAML.

    Raises:
        ConfigError: One is not written so.
    """
    for override in overrides:
        _apply_override(raw, override)


def parse_config(raw: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validates a mapping.

    Raises:
        ConfigError: One message with all that is wrong, each with its key, value and the way to mend it.
    """
    # A section whose keys are all commented out.
    filled = {key: {} if value is None and key in Config.model_fields else value for key, value in raw.items()}
    try:
        return Config.model_validate(filled)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for problem in error.errors(include_url=False):
            beginning, rest = _explain(dict(problem))
            found.setdefault(beginning, []).append(rest)
        lines = [beginning + ", or: ".join(rests) for beginning, rests in found.items()]
        raise ConfigError(f"{source}: " + "\n".join(lines)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write section.key=value")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section")
    try:
        node[last] = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None


# What pydantic puts behind a key that may have values of several kinds: the kind that it has tried.
_KIND = re.compile(r"(constrained-|literal\[|function-|list\[|dict\[|tuple\[).*|int|float|str|bool|[A-Z]\w*")


def _explain(problem: dict[str, Any]) -> tuple[str, str]:
    """What is wrong: where, and what. Of what is said of one value for each kind that it may have, the first is one."""
    location = [str(part) for part in problem["loc"]]
    while len(location) > 1 and _KIND.fullmatch(location[-1]):
        location.pop()
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {hint}", ""
    if problem["type"] == "missing":
        return f"{key} is required", ""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]), ""
    return f"{key} is {problem['input']!r}: ", problem["msg"]


def _section_at(location: list[str]) -> type[Section]:
    section: type[Section] = Config
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return section


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def template() -> str:
    """A commented configuration to start from: required keys to fill in, every other key with its default."""
    lines = ["# A dpo-ray run: fill in what is marked as required, then: dpo-ray train THIS_FILE"]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += ["", f"# {(field.annotation.__doc__ or '').strip()}", f"{name}:"]
            for key, inner in field.annotation.model_fields.items():
                lines += [f"  # {_describe(inner)}", f"  {key}: {_default(key, inner)}"]
        else:
            lines += [f"# {_describe(field)}", f"{name}: {_default(name, field)}"]
    return "\n".join(lines) + "\n"


_EXAMPLES = {
    "name": "my-run",
    "storage_path": "s3://bucket/dpo",
    "path": "path/of/the/model",
    "train": '["pairs/*.jsonl.gz"]',
}


def _describe(field: FieldInfo) -> str:
    return f"{field.description or ''}{' (required)' if field.is_required() else ''}"


def _default(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return _EXAMPLES[key]
    value = field.default
    return json.dumps(list(value) if isinstance(value, tuple) else value)
