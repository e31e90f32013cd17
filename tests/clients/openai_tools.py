"""Tools and structured output by the official OpenAI SDK: arguments are base URL and a model whose template has tools."""

import json
import sys

import openai

base_url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)
CITIES = ["La Paz", "Cusco", "Puno"]
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
weather = {"name": "weather", "description": "The weather of a city.", "parameters": schema}
tools = [{"type": "function", "function": weather}]
question = {"role": "user", "content": "What is the weather in Cusco?"}
# A toy that must call calls until it is stopped: once is enough.
once = {"parallel_tool_calls": False}
common = {"model": model, "messages": [question], "temperature": 0, "max_tokens": 200}

for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    whole = client.chat.completions.create(**common, **once, tools=tools, tool_choice=choice)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls" and len(message.tool_calls) == 1, whole
    call = message.tool_calls[0]
    assert call.type == "function" and call.id and call.function.name == "weather", call
    assert json.loads(call.function.arguments)["city"] in CITIES, call

    pieces = {}
    for chunk in client.chat.completions.create(**common, **once, tools=tools, tool_choice=choice, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name, arguments = pieces.get(piece.index, ("", ""))
            pieces[piece.index] = (name + (piece.function.name or ""), arguments + (piece.function.arguments or ""))
        finish = chunk.choices[0].finish_reason
    assert finish == "tool_calls", finish
    assert pieces[0] == ("weather", call.function.arguments), (pieces, call)

# The result goes back, and the model goes on.
turn = [question, message.model_dump(exclude_none=True)]
turn += [{"role": "tool", "tool_call_id": call.id, "content": "8 °C"} for call in message.tool_calls]
answer = client.chat.completions.create(**{**common, "messages": turn, "max_tokens": 8}, tools=tools)
assert answer.usage.prompt_tokens > whole.usage.prompt_tokens, answer

form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
formed = client.chat.completions.create(**common, response_format=form)
assert json.loads(formed.choices[0].message.content)["city"] in CITIES, formed
assert formed.choices[0].finish_reason == "stop", formed

# The same by Responses.
flat = [{"type": "function", **weather, "strict": True}]
common = {"model": model, "input": question["content"], "temperature": 0, "max_output_tokens": 200}
response = client.responses.create(**common, **once, tools=flat, tool_choice="required")
calls = [item for item in response.output if item.type == "function_call"]
assert calls and calls[0].name == "weather" and json.loads(calls[0].arguments)["city"] in CITIES, response
assert response.status == "completed", response

with client.responses.stream(**common, **once, tools=flat, tool_choice={"type": "function", "name": "weather"}) as stream:
    deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    final = stream.get_final_response()
streamed = [item for item in final.output if item.type == "function_call"]
assert streamed[0].arguments in "".join(deltas) and json.loads(streamed[0].arguments)["city"] in CITIES, final

items = [question] + [item.model_dump(exclude_none=True) for item in response.output]
items += [{"type": "function_call_output", "call_id": call.call_id, "output": "8 °C"} for call in calls]
after = client.responses.create(**{**common, "input": items, "max_output_tokens": 8}, tools=flat)
assert after.usage.input_tokens > response.usage.input_tokens, after

form = {"format": {"type": "json_schema", "name": "place", "schema": schema, "strict": True}}
formed = client.responses.create(**common, text=form)
assert json.loads(formed.output_text)["city"] in CITIES, formed

for bad in ({"type": "object", "properties": 7}, {"$ref": "#/nowhere"}):
    try:
        client.responses.create(**common, text={"format": {"type": "json_schema", "name": "bad", "schema": bad}})
    except openai.BadRequestError:
        pass
    else:
        raise AssertionError(f"{bad} was compiled")

print("ok")
