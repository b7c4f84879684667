"""The config as a JSON Schema (draft 2020-12), made of the tables that read it."""

from __future__ import annotations

from typing import Any

from backhaul.formats.channel_settings import channel_schema
from backhaul.formats.job_settings import Setting, settings_of
from backhaul.formats.store_settings import SETTING_HELP
from backhaul.model.job import KINDS

_NAME = "^[A-Za-z][A-Za-z0-9_-]*$"


def config_schema() -> dict[str, Any]:
    """Return the schema of a config file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Backhaul's config",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "stores": _named(_store()),
            "notify": _named(channel_schema()),
            "defaults": _table(settings_of("")),
            "jobs": _named({"oneOf": [_job(kind) for kind in KINDS]}),
        },
    }


def _named(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {_NAME: schema}, "additionalProperties": False}


def _store() -> dict[str, Any]:
    properties: dict[str, Any] = {"url": {"type": "string", "description": "the store path"}}
    for key, words in SETTING_HELP:
        kinds: dict[str, Any] = {"type": ["string", "integer"], "description": words}
        if key == "tags":
            kinds = {"type": ["string", "object"], "description": words}
        for spelling in {key, key.replace("-", "_")}:
            properties[spelling] = kinds
    return {"type": "object", "properties": properties, "required": ["url"], "additionalProperties": False}


def _job(kind: str) -> dict[str, Any]:
    table = _table(settings_of(kind))
    table["properties"]["kind"] = {"const": kind}
    table["required"] = ["kind"]
    return table


def _table(settings: dict[str, Setting]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key, setting in settings.items():
        for spelling in {key, key.replace("_", "-")}:
            properties[spelling] = {**setting.form.schema, "description": setting.help}
    return {"type": "object", "properties": properties, "additionalProperties": False}
