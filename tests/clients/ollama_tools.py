"""Tools, thinking and structured output by the official Ollama SDK: arguments are base URL, a model whose template has
tools, and one whose template has it think."""

import json
import sys

import ollama

base_url, model, thinker = sys.argv[1:]
client = ollama.Client(host=base_url, timeout=60)
CITIES = ["La Paz", "Cusco", "Puno"]
greedy = {"temperature": 0, "num_predict": 200}


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: The city.
    """
    return f"8 °C in {city}"


schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": schema}}
question = {"role": "user", "content": "What is the weather in Cusco?"}

assert "tools" in client.show(model).capabilities, client.show(model)
assert "thinking" in client.show(thinker).capabilities, client.show(thinker)

# Tools as schemas and as functions, which the SDK makes schemas of, are in the prompt.
few = {**greedy, "num_predict": 4}
plain = client.chat(model=model, messages=[question], options=few)
for tools in ([tool], [weather]):
    offered = client.chat(model=model, messages=[question], options=few, tools=tools)
    assert offered.prompt_eval_count > plain.prompt_eval_count, (offered, plain)

# A toy calls a tool only when it must. The SDK has no word for that; its types read the answer.
must = {"model": model, "messages": [question], "tools": [tool], "options": greedy, "tool_choice": "required", "parallel_tool_calls": False}
whole = client._request(ollama.ChatResponse, "POST", "/api/chat", json={**must, "stream": False})
call = whole.message.tool_calls[0]
assert call.function.name == "weather" and call.function.arguments["city"] in CITIES, whole
assert whole.done and whole.done_reason == "stop", whole
chunks = list(client._request(ollama.ChatResponse, "POST", "/api/chat", json={**must, "stream": True}, stream=True))
calls = [call for chunk in chunks for call in chunk.message.tool_calls or []]
assert calls == whole.message.tool_calls, (calls, whole)
assert chunks[-1].done and not any(chunk.message.content for chunk in chunks), chunks

# The result goes back, and the model goes on.
turn = [question, whole.message, {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}]
after = client.chat(model=model, messages=turn, options=few, tools=[weather])
assert after.prompt_eval_count > whole.prompt_eval_count and after.message.content, after

formed = client.chat(model=model, messages=[question], options=greedy, format=schema)
assert json.loads(formed.message.content)["city"] in CITIES, formed

# Thinking stands apart, and is off when it is to be.
thinks = client.chat(model=thinker, messages=[question], options=few, think=True)
assert thinks.message.thinking and not thinks.message.content, thinks
chunks = list(client.chat(model=thinker, messages=[question], options=few, think=True, stream=True))
assert "".join(chunk.message.thinking or "" for chunk in chunks).strip() == thinks.message.thinking, (chunks, thinks)
silent = client.chat(model=thinker, messages=[question], options={**greedy, "num_predict": 8}, think=False)
assert silent.message.content and not silent.message.thinking, silent
level = client.chat(model=thinker, messages=[question], options=few, think="high")
assert level.message.thinking, level
said = client.generate(model=thinker, prompt=question["content"], options=few, think=True)
assert said.thinking and not said.response, said

try:
    client.chat(model=model, messages=[question], options=few, tools=[{"type": "function", "function": {"name": "a b"}}])
except ollama.ResponseError as error:
    assert error.status_code == 400 and "name" in error.error, error
else:
    raise AssertionError("a tool's name with a space was taken")

print("ok")
