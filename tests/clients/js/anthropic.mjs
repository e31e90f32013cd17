// The official Anthropic SDK for JavaScript against a running model: arguments are base URL, model, prompt and answer.

import assert from 'node:assert/strict';
import Anthropic from '@anthropic-ai/sdk';

const [baseURL, model, prompt, expected] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: 'none', maxRetries: 0, timeout: 60_000 });
const messages = [{ role: 'user', content: prompt }];
const common = { model, max_tokens: 200, messages, temperature: 0 };

const whole = await client.messages.create(common);
assert.deepEqual(whole.content, [{ type: 'text', text: expected }]);
assert.equal(whole.stop_reason, 'end_turn');
assert(whole._request_id);

const counted = await client.messages.countTokens({ model, messages });
assert.equal(counted.input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);

let text = '';
const kinds = [];
for await (const event of await client.messages.create({ ...common, stream: true })) {
  kinds.push(event.type);
  if (event.type === 'content_block_delta') text += event.delta.text;
}
assert.equal(text, expected);
assert.deepEqual(kinds.slice(-3), ['content_block_stop', 'message_delta', 'message_stop']);

text = '';
const stream = client.messages.stream(common).on('text', (piece) => { text += piece; });
const final = await stream.finalMessage();
assert.equal(text, expected);
assert.equal(final.content[0].text, expected);
assert.equal(final.usage.output_tokens, whole.usage.output_tokens);

const word = ` ${expected.split(' ')[1]}`;
const stopped = await client.messages.create({ ...common, stop_sequences: [word] });
assert.deepEqual([stopped.stop_reason, stopped.stop_sequence], ['stop_sequence', word]);

const refused = async (kind, type, more) => {
  for (const stream of [false, true]) {
    const call = client.messages.create({ ...common, stream, ...more });
    const error = await call.then(() => assert.fail('it was accepted'), (error) => error);
    assert(error instanceof kind, `${error}`);
    assert.equal(error.error.error.type, type);
  }
};
await refused(Anthropic.NotFoundError, 'not_found_error', { model: 'no-such-model' });
await refused(Anthropic.BadRequestError, 'invalid_request_error', { temperature: 9 });
await refused(Anthropic.BadRequestError, 'invalid_request_error', { messages: [{ role: 'robot', content: 'x' }] });

console.log('ok');
