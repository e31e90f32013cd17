"""The official OpenAI SDK's Responses against a running model: arguments are base URL, model, prompt and answer."""

import sys

import openai

base_url, model, prompt, expected = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)

whole = client.responses.create(model=model, input=prompt, temperature=0)
assert whole.output_text == expected, whole
assert whole.status == "completed" and whole.error is None, whole
assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens, whole
assert whole.usage.output_tokens > 0 and whole.store is False, whole

# Items, and a conversation that is sent again as it came.
items = [{"role": "user", "content": [{"type": "input_text", "text": prompt}]}]
again = client.responses.create(model=model, input=items, temperature=0)
assert again.output_text == expected, again
items += [item.model_dump(exclude_none=True) for item in again.output]
items.append({"role": "user", "content": prompt})
assert client.responses.create(model=model, input=items, max_output_tokens=8, temperature=0).output_text

briefed = client.responses.create(model=model, instructions="Be brief.", input=prompt, max_output_tokens=4)
assert briefed.instructions == "Be brief." and briefed.usage.input_tokens > whole.usage.input_tokens, briefed
assert briefed.status == "incomplete" and briefed.incomplete_details.reason == "max_output_tokens", briefed

events = list(client.responses.create(model=model, input=prompt, temperature=0, stream=True))
assert [event.sequence_number for event in events] == list(range(len(events))), events
assert [event.type for event in events[:4]] == [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
], events
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected, events
assert events[-1].type == "response.completed" and events[-1].response.output_text == expected, events[-1]
assert events[-1].response.usage.output_tokens == whole.usage.output_tokens, events[-1]

# The helper that puts a stream together again.
with client.responses.stream(model=model, input=prompt, temperature=0) as stream:
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    final = stream.get_final_response()
assert text == expected and final.output_text == expected, final

probable = client.responses.create(
    model=model, input=prompt, temperature=0, max_output_tokens=3,
    include=["message.output_text.logprobs"], top_logprobs=2,
)
tokens = probable.output[0].content[0].logprobs
assert len(tokens) == 3 and all(len(token.top_logprobs) == 2 for token in tokens), tokens
assert "".join(token.token for token in tokens) == probable.output_text, probable


def refused(kind, param, **arguments):
    for stream in (False, True):
        try:
            client.responses.create(**{"model": model, "input": prompt, "stream": stream, **arguments})
        except kind as error:
            assert error.param == param, (error.param, error)
        else:
            raise AssertionError(f"{arguments} was accepted")


refused(openai.NotFoundError, "model", model="no-such-model")
refused(openai.BadRequestError, "previous_response_id", previous_response_id="resp_1")
refused(openai.BadRequestError, "background", background=True)
refused(openai.BadRequestError, "temperature", temperature=9)
refused(openai.BadRequestError, "tools[0]", tools=[{"type": "web_search"}])
refused(openai.BadRequestError, "input[0]", input=[{"type": "item_reference", "id": "msg_1"}])
refused(openai.BadRequestError, "input", input="llama " * 20000)

print("ok")
