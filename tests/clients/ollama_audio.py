"""Sound by the official Ollama SDK, which sends it among the images: arguments are base URL, a model that reads sound, one
that does not."""

import sys

import ollama
from wav import wav

base_url, model, deaf = sys.argv[1:]
client = ollama.Client(host=base_url, timeout=60)
options = {"temperature": 0, "num_predict": 12}


def messages(*seeds):
    return [{"role": "user", "content": "What is it?", "images": [wav(seed) for seed in seeds]}]


text = client.chat(model=model, messages=messages(), options=options)
whole = client.chat(model=model, messages=messages(3), options=options)
assert whole.prompt_eval_count >= text.prompt_eval_count + 187, (whole, text)
said = client.generate(model=model, prompt="What is it?", images=[wav(3)], options=options)
assert said.response == whole.message.content, (said, whole)
assert "audio" in client.show(model).capabilities, client.show(model)
assert "audio" not in client.show(deaf).capabilities, client.show(deaf)
try:
    client.chat(model=deaf, messages=messages(3), options=options)
    raise AssertionError("a model that reads text only took a sound")
except ollama.ResponseError as error:
    assert error.status_code == 400 and "text only" in error.error, error
print("ok")
