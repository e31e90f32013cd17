"""Thinking by the official Anthropic SDK: arguments are base URL and a model whose template has it think."""

import sys

import anthropic

base_url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=60)
common = {"model": model, "max_tokens": 48, "messages": [{"role": "user", "content": "What can you do?"}],
          "extra_body": {"temperature": 0}}

# The toy never ends to think by itself: its budget does.
budget = {"type": "enabled", "budget_tokens": 4}
whole = client.messages.create(**common, thinking=budget)
assert [block.type for block in whole.content] == ["thinking", "text"], whole
thought, text = whole.content
assert thought.thinking and len(thought.thinking.split()) <= 4 and text.text, whole

with client.messages.stream(**common, thinking=budget) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_message()
assert "thinking" in kinds and "text" in kinds, kinds
assert final.content[0].thinking == thought.thinking and final.content[1].text == text.text, (final, whole)

# Off is the default, and is off.
for off in ({}, {"thinking": {"type": "disabled"}}):
    silent = client.messages.create(**common, **off)
    assert [block.type for block in silent.content] == ["text"], silent

print("ok")
