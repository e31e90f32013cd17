// The official OpenAI SDK for JavaScript against a running model: arguments are base URL, model, prompt and answer.

import assert from 'node:assert/strict';
import OpenAI from 'openai';

const [baseURL, model, prompt, expected] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: 'none', maxRetries: 0, timeout: 60_000 });
const messages = [{ role: 'user', content: prompt }];

const names = (await client.models.list()).data.map((entry) => entry.id);
assert(names.includes(model), names);

const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
assert.equal(whole.choices[0].message.content, expected);
assert.equal(whole.choices[0].finish_reason, 'stop');

let text = '';
let usage = null;
const chunks = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of chunks) {
  text += chunk.choices[0]?.delta.content ?? '';
  usage = chunk.usage ?? usage;
}
assert.equal(text, expected);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const helped = await client.chat.completions.stream({ model, messages, temperature: 0 }).finalContent();
assert.equal(helped, expected);

const plain = await client.completions.create({ model, prompt: 'The llama', max_tokens: 4, temperature: 0 });
assert(plain.choices[0].text.length > 0);

const response = await client.responses.create({ model, input: prompt, temperature: 0 });
assert.equal(response.output_text, expected);
assert.equal(response.usage.output_tokens, whole.usage.completion_tokens);

text = '';
let last = null;
for await (const event of await client.responses.create({ model, input: prompt, temperature: 0, stream: true })) {
  if (event.type === 'response.output_text.delta') text += event.delta;
  last = event;
}
assert.equal(text, expected);
assert.equal(last.type, 'response.completed');

const final = await client.responses.stream({ model, input: prompt, temperature: 0 }).finalResponse();
assert.equal(final.output_text, expected);

// Hanging up in mid-stream, as a browser does.
const endless = await client.chat.completions.create({
  model, messages: [{ role: 'user', content: 'Sing forever.' }], stream: true, max_tokens: 2000,
});
for await (const chunk of endless) if (chunk.choices[0]?.delta.content) break;

const refused = async (kind, check, call) => {
  const error = await call.then(() => assert.fail('it was accepted'), (error) => error);
  assert(error instanceof kind, `${error}`);
  check(error);
};
await refused(OpenAI.NotFoundError, (e) => assert.equal(e.code, 'model_not_found'),
  client.chat.completions.create({ model: 'no-such-model', messages }));
await refused(OpenAI.BadRequestError, (e) => assert.equal(e.param, 'temperature'),
  client.chat.completions.create({ model, messages, temperature: 9, stream: true }));
await refused(OpenAI.BadRequestError, (e) => assert.equal(e.param, 'previous_response_id'),
  client.responses.create({ model, input: prompt, previous_response_id: 'resp_1' }));
await refused(OpenAI.BadRequestError, (e) => assert.equal(e.code, 'context_length_exceeded'),
  client.responses.create({ model, input: 'llama '.repeat(20_000), stream: true }));

console.log('ok');
