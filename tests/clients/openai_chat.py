"""The official OpenAI SDK against a running model: arguments are base URL, model, prompt and the expected answer."""

import sys

import openai

base_url, model, prompt, expected = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)
messages = [{"role": "user", "content": prompt}]

names = [entry.id for entry in client.models.list()]
assert model in names, names

whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
assert whole.choices[0].message.content == expected, whole
assert whole.choices[0].finish_reason == "stop", whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole

stream = client.chat.completions.create(
    model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == expected, text
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens, chunks[-1]

short = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=2)
assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2, short

plain = client.completions.create(model=model, prompt="The llama", max_tokens=4, temperature=0)
assert plain.choices[0].text and plain.usage.completion_tokens <= 4, plain

try:
    client.chat.completions.create(model="no-such-model", messages=messages)
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error
else:
    raise AssertionError("an unknown model was answered")

try:
    client.chat.completions.create(model=model, messages=messages, temperature=9)
except openai.BadRequestError as error:
    assert error.param == "temperature", error
else:
    raise AssertionError("temperature 9 was accepted")

try:
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "llama " * 20000}])
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded", error
else:
    raise AssertionError("a prompt of 20,000 words was accepted")

print("ok")
