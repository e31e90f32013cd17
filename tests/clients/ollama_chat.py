"""The official Ollama SDK against a running model: arguments are base URL, model, prompt and the expected answer."""

import sys

import ollama

base_url, model, prompt, expected = sys.argv[1:]
client = ollama.Client(host=base_url, timeout=60)
messages = [{"role": "user", "content": prompt}]
greedy = {"temperature": 0}

names = [entry.model for entry in client.list().models]
assert f"{model}:latest" in names, names

# A chat, whole and streamed, with or without the tag.
whole = client.chat(model=model, messages=messages, options=greedy)
assert whole.message.content == expected, whole
assert whole.done and whole.done_reason == "stop", whole
assert whole.total_duration >= whole.prompt_eval_duration + whole.eval_duration > 0, whole
assert whole.prompt_eval_count > 0 and whole.eval_count > 0, whole
chunks = list(client.chat(model=f"{model}:latest", messages=messages, options=greedy, stream=True))
assert "".join(chunk.message.content for chunk in chunks) == expected, chunks
assert len(chunks) > 3 and chunks[-1].done and chunks[-1].eval_count == whole.eval_count, chunks[-1]

# A prompt: templated, raw, streamed, cut.
said = client.generate(model=model, prompt=prompt, options=greedy)
assert said.response == expected, said
raw = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
assert client.generate(model=model, prompt=raw, raw=True, options=greedy).response == expected
pieces = list(client.generate(model=model, prompt=prompt, options=greedy, stream=True))
assert "".join(piece.response for piece in pieces) == expected, pieces
short = client.generate(model=model, prompt=prompt, options={**greedy, "num_predict": 2, "num_ctx": 512})
assert short.done_reason == "length" and short.eval_count == 2, short
sure = client.chat(model=model, messages=messages, options={**greedy, "num_predict": 2}, logprobs=True, top_logprobs=2)
assert len(sure.logprobs) == 2 and len(sure.logprobs[0].top_logprobs) == 2, sure

# What the model is, and that it is loaded.
shown = client.show(model)
assert shown.details.format == "gguf" and "completion" in shown.capabilities, shown
assert shown.modelinfo[f"{shown.details.family}.context_length"] > 0, shown.modelinfo
loaded = [entry for entry in client.ps().models if entry.model == f"{model}:latest"]
assert loaded and loaded[0].size > 0 and loaded[0].context_length > 0 and loaded[0].expires_at, loaded


def refused(status, call):
    try:
        call()
    except ollama.ResponseError as error:
        assert error.status_code == status, (error.status_code, error.error)
        return error.error
    raise AssertionError(f"accepted instead of {status}")


assert "does not exist" in refused(404, lambda: client.chat(model="no-such-model", messages=messages))
assert "temperature" in refused(400, lambda: client.chat(model=model, messages=messages, options={"temperature": 9}))
assert "suffix" not in refused(400, lambda: client.generate(model=model, prompt="a", suffix="b"))
assert "kubectl" in refused(403, lambda: client.pull("llama3"))
assert "kubectl" in refused(403, lambda: client.delete(model))
assert "kubectl" in refused(403, lambda: client.copy(model, "other"))
seen = []
refused(404, lambda: seen.extend(client.chat(model="no-such-model", messages=messages, stream=True)))
assert not seen, seen

print("ok")
