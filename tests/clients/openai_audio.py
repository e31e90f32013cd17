"""Sound by the official OpenAI SDK: arguments are base URL, a model that reads sound, one that does not."""

import sys

import openai
from wav import wav

base_url, model, deaf = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)


def messages(*sounds):
    parts = [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}} for sound in sounds]
    return [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}]


common = {"model": model, "temperature": 0, "max_tokens": 12}
text = client.chat.completions.create(messages=messages(), **common)
whole = client.chat.completions.create(messages=messages(wav(3)), **common)
assert whole.usage.prompt_tokens >= text.usage.prompt_tokens + 187, (whole, text)
again = client.chat.completions.create(messages=messages(wav(3)), **common)
assert again.choices[0].message.content == whole.choices[0].message.content, (again, whole)
assert again.usage.prompt_tokens_details.cached_tokens >= 187, again
both = client.chat.completions.create(messages=messages(wav(3), wav(5, 44100)), **common)
assert both.usage.prompt_tokens >= whole.usage.prompt_tokens + 187, both
stream = client.chat.completions.create(messages=messages(wav(3)), stream=True, **common)
said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
assert said == whole.choices[0].message.content, said

part = {"type": "input_audio", "input_audio": {"data": wav(3), "format": "wav"}}
response = client.responses.create(
    model=model,
    temperature=0,
    max_output_tokens=12,
    input=[{"role": "user", "content": [{"type": "input_text", "text": "What is it?"}, part]}],
)
assert response.output_text == whole.choices[0].message.content, response

try:
    client.chat.completions.create(messages=messages(wav(3)), **{**common, "model": deaf})
    raise AssertionError("a model that reads text only took a sound")
except openai.BadRequestError as error:
    assert error.param == "messages[0].content[1].input_audio.data" and "text only" in error.message, error
try:
    client.chat.completions.create(messages=messages("aGVsbG8="), **common)
    raise AssertionError("a text was taken for a sound")
except openai.BadRequestError as error:
    assert "no audio" in error.message, error
print("ok")
