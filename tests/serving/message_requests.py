"""Parts of requests in Anthropic's form."""

from __future__ import annotations

ASKED = [{"role": "user", "content": "the quick brown dog"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "input_schema": SCHEMA}
TIME = {"name": "get_time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome", "days": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}


def asked(**more):
    return {"messages": ASKED, "max_tokens": 12, "temperature": 0, **more}
