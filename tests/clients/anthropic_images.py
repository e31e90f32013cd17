"""Images by the official Anthropic SDK: arguments are base URL, a model that reads images, one that does not."""

import sys

import anthropic
from png import png

base_url, model, blind = sys.argv[1:]
client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=60)


def messages(*seeds):
    source = {"type": "base64", "media_type": "image/png"}
    images = [{"type": "image", "source": {**source, "data": png(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}]


common = {"model": model, "max_tokens": 12, "extra_body": {"temperature": 0}}
whole = client.messages.create(messages=messages(3), **common)
text = client.messages.count_tokens(model=model, messages=messages()).input_tokens
counted = client.messages.count_tokens(model=model, messages=messages(3)).input_tokens
assert counted >= text + 16, (counted, text)
used = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
assert used == counted, (whole, counted)
with client.messages.stream(messages=messages(3), **common) as stream:
    said = "".join(stream.text_stream)
assert said == whole.content[0].text, (said, whole)
both = client.messages.create(messages=messages(3, 5), **common)
assert both.content, both

for wrong in (
    {"messages": messages(3), "model": blind},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}]}]},
):
    try:
        client.messages.create(**{**common, **wrong})
        raise AssertionError(f"{wrong} was taken")
    except anthropic.BadRequestError as error:
        assert error.body["error"]["type"] == "invalid_request_error", error
print("ok")
