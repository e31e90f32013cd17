"""Tools and structured output by the official Anthropic SDK: arguments are base URL and a model whose template has tools."""

import json
import sys

import anthropic

base_url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=60)
CITIES = ["La Paz", "Cusco", "Puno"]
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
tools = [{"name": "weather", "description": "The weather of a city.", "input_schema": schema}]
question = {"role": "user", "content": "What is the weather in Cusco?"}
common = {"model": model, "max_tokens": 200, "messages": [question], "extra_body": {"temperature": 0}}

for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
    # A toy that must call calls until it is stopped: once is enough.
    choice = {**choice, "disable_parallel_tool_use": True}
    whole = client.messages.create(**common, tools=tools, tool_choice=choice)
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert whole.stop_reason == "tool_use" and calls, whole
    assert calls[0].name == "weather" and calls[0].id and calls[0].input["city"] in CITIES, whole

    with client.messages.stream(**common, tools=tools, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    streamed = [block for block in final.content if block.type == "tool_use"]
    assert final.stop_reason == "tool_use" and streamed[0].input == calls[0].input, final
    assert json.dumps(streamed[0].input["city"], ensure_ascii=False) in "".join(pieces), pieces

counted = client.messages.count_tokens(model=model, messages=[question], tools=tools).input_tokens
assert counted > client.messages.count_tokens(model=model, messages=[question]).input_tokens, counted

turn = [
    question,
    {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in whole.content]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "8 °C"} for call in calls]},
]
answer = client.messages.create(**{**common, "messages": turn, "max_tokens": 8}, tools=tools)
tokens = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
assert tokens > counted, answer

format = {"type": "json_schema", "schema": schema}
formed = client.messages.create(**common, output_config={"format": format})
assert json.loads(formed.content[-1].text)["city"] in CITIES, formed

# The answer goes on from the last message.
begun = {"role": "assistant", "content": "The weather in Cusco is"}
goes_on = client.messages.create(**{**common, "messages": [question, begun], "max_tokens": 4})
assert not goes_on.content or not goes_on.content[0].text.startswith("The weather in Cusco"), goes_on

print("ok")
