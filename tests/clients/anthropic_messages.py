"""The official Anthropic SDK against a running model: arguments are base URL, model, prompt and the expected answer."""

import sys

import anthropic

base_url, model, prompt, expected = sys.argv[1:]
client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=60)
messages = [{"role": "user", "content": prompt}]
# Sampling is no argument of this SDK; the API has it.
common = {"model": model, "max_tokens": 200, "messages": messages, "extra_body": {"temperature": 0}}

whole = client.messages.create(**common)
assert [block.type for block in whole.content] == ["text"] and whole.content[0].text == expected, whole
assert (whole.type, whole.role, whole.model, whole.stop_reason) == ("message", "assistant", model, "end_turn"), whole
assert whole._request_id, "no request-id"
prompt_tokens = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
assert client.messages.count_tokens(model=model, messages=messages).input_tokens == prompt_tokens, whole.usage

blocks = [{"type": "text", "text": prompt, "cache_control": {"type": "ephemeral"}}]
again = client.messages.create(**{**common, "messages": [{"role": "user", "content": blocks}]})
assert again.content[0].text == expected, again

system = [{"type": "text", "text": "Be brief."}]
more = client.messages.count_tokens(model=model, messages=messages, system=system).input_tokens
assert more > prompt_tokens, more

short = client.messages.create(**{**common, "max_tokens": 2})
assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2, short

first, second = expected.split(" ", 2)[:2]
stopped = client.messages.create(**common, stop_sequences=["never", f" {second}"])
assert stopped.content[0].text == first, stopped
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", f" {second}"), stopped

with client.messages.stream(**common) as stream:
    events = list(stream)
    final = stream.get_final_message()
assert final.content[0].text == expected and final.stop_reason == "end_turn", final
assert final.usage.output_tokens == whole.usage.output_tokens, final
assert "".join(event.text for event in events if event.type == "text") == expected, events
kinds = [event.type for event in events if event.type != "text"]
assert kinds[:2] == ["message_start", "content_block_start"], kinds
assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"], kinds

raw = list(client.messages.create(**common, stream=True))
assert raw[0].message.usage.input_tokens == prompt_tokens, raw[0]
assert "".join(event.delta.text for event in raw if event.type == "content_block_delta") == expected, raw


def refused(kind, error_type, **arguments):
    for stream in (False, True):
        try:
            client.messages.create(**{**common, "stream": stream, **arguments})
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["type"] == error_type, error.body
            assert error.body["request_id"] == error.request_id, error.body
        else:
            raise AssertionError(f"{arguments} was accepted")


refused(anthropic.NotFoundError, "not_found_error", model="no-such-model")
refused(anthropic.BadRequestError, "invalid_request_error", extra_body={"temperature": 9})
refused(anthropic.BadRequestError, "invalid_request_error", max_tokens=0)
refused(anthropic.BadRequestError, "invalid_request_error", messages=[])
refused(anthropic.BadRequestError, "invalid_request_error", tools=[{"type": "web_search_20250305", "name": "web_search"}])
refused(anthropic.BadRequestError, "invalid_request_error", messages=[{"role": "user", "content": "llama " * 20000}])

print("ok")
