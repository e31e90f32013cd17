"""Images by the official Ollama SDK: arguments are base URL, a model that reads images, one that does not."""

import sys

import ollama
from png import png

base_url, model, blind = sys.argv[1:]
client = ollama.Client(host=base_url, timeout=60)
options = {"temperature": 0, "num_predict": 12}


def messages(*seeds):
    return [{"role": "user", "content": "What is it?", "images": [png(seed) for seed in seeds]}]


text = client.chat(model=model, messages=messages(), options=options)
whole = client.chat(model=model, messages=messages(3), options=options)
assert whole.prompt_eval_count >= text.prompt_eval_count + 16, (whole, text)
said = client.generate(model=model, prompt="What is it?", images=[png(3)], options=options)
assert said.response == whole.message.content, (said, whole)
assert "vision" in client.show(model).capabilities, client.show(model)
assert "vision" not in client.show(blind).capabilities, client.show(blind)
try:
    client.chat(model=blind, messages=messages(3), options=options)
    raise AssertionError("a model that reads text only took an image")
except ollama.ResponseError as error:
    assert error.status_code == 400 and "text only" in error.error, error
print("ok")
