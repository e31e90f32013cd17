"""Images by the official OpenAI SDK: arguments are base URL, a model that reads images, one that does not."""

import sys

import openai
from png import png

base_url, model, blind = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)


def messages(*seeds):
    images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(seed)}"}} for seed in seeds]
    return [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *images]}]


common = {"model": model, "temperature": 0, "max_tokens": 12}
text = client.chat.completions.create(messages=messages(), **common)
whole = client.chat.completions.create(messages=messages(3), **common)
assert whole.usage.prompt_tokens >= text.usage.prompt_tokens + 16, (whole, text)
again = client.chat.completions.create(messages=messages(3), **common)
assert again.choices[0].message.content == whole.choices[0].message.content, (again, whole)
assert again.usage.prompt_tokens_details.cached_tokens >= 16, again
both = client.chat.completions.create(messages=messages(3, 5), **common)
assert both.usage.prompt_tokens >= whole.usage.prompt_tokens + 16, both
stream = client.chat.completions.create(messages=messages(3), stream=True, **common)
said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
assert said == whole.choices[0].message.content, said

part = {"type": "input_image", "image_url": f"data:image/png;base64,{png(3)}", "detail": "auto"}
response = client.responses.create(
    model=model,
    temperature=0,
    max_output_tokens=12,
    input=[{"role": "user", "content": [{"type": "input_text", "text": "What is it?"}, part]}],
)
assert response.output_text == whole.choices[0].message.content, response

try:
    client.chat.completions.create(messages=messages(3), **{**common, "model": blind})
    raise AssertionError("a model that reads text only took an image")
except openai.BadRequestError as error:
    assert error.param == "messages[0].content[1].image_url.url" and "text only" in error.message, error
try:
    content = [{"type": "image_url", "image_url": {"url": "https://example.com/llama.png"}}]
    client.chat.completions.create(messages=[{"role": "user", "content": content}], **common)
    raise AssertionError("an address was taken")
except openai.BadRequestError as error:
    assert error.param == "messages[0].content[0].image_url.url", error
print("ok")
