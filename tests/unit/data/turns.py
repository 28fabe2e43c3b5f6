"""Turns of conversations that several tests render."""

from __future__ import annotations

ASKED = {"role": "user", "content": "Two and two?"}
AGAIN = {"role": "user", "content": "And two?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": 'R "x"\n'}}}
RESULT = {"role": "tool", "content": "4"}


def assistant_turn(text, **more):
    return {"role": "assistant", "content": text, **more}
