// Tools and structured output by the official SDKs for JavaScript: arguments are base URL and a model whose template
// has tools.

import assert from 'node:assert/strict';
import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';

const [baseURL, model] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: 'none', maxRetries: 0, timeout: 60_000 });
const anthropic = new Anthropic({ baseURL, apiKey: 'none', maxRetries: 0, timeout: 60_000 });
const CITIES = ['La Paz', 'Cusco', 'Puno'];
const schema = {
  type: 'object',
  properties: { city: { type: 'string', enum: CITIES } },
  required: ['city'],
  additionalProperties: false,
};
const description = 'The weather of a city.';
const messages = [{ role: 'user', content: 'What is the weather in Cusco?' }];
const isCall = (name, city) => {
  assert.equal(name, 'weather');
  assert(CITIES.includes(city), city);
};

const chat = {
  model, messages, temperature: 0, max_tokens: 200, tool_choice: 'required',
  // A toy that must call calls until it is stopped: once is enough.
  parallel_tool_calls: false,
  tools: [{ type: 'function', function: { name: 'weather', description, parameters: schema } }],
};
const whole = await openai.chat.completions.create(chat);
const call = whole.choices[0].message.tool_calls[0];
assert.equal(whole.choices[0].finish_reason, 'tool_calls');
isCall(call.function.name, JSON.parse(call.function.arguments).city);

const streamed = await openai.chat.completions.stream(chat).finalChatCompletion();
assert.equal(streamed.choices[0].finish_reason, 'tool_calls');
assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);

const formed = await openai.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 200,
  response_format: { type: 'json_schema', json_schema: { name: 'place', schema, strict: true } },
});
assert(CITIES.includes(JSON.parse(formed.choices[0].message.content).city));

const response = await openai.responses.stream({
  model, input: messages, temperature: 0, max_output_tokens: 200, tool_choice: 'required',
  parallel_tool_calls: false,
  tools: [{ type: 'function', name: 'weather', description, parameters: schema, strict: true }],
}).finalResponse();
const item = response.output.find((one) => one.type === 'function_call');
isCall(item.name, JSON.parse(item.arguments).city);

const ask = {
  model, messages, temperature: 0, max_tokens: 200, tool_choice: { type: 'any', disable_parallel_tool_use: true },
  tools: [{ name: 'weather', description, input_schema: schema }],
};
const message = await anthropic.messages.create(ask);
assert.equal(message.stop_reason, 'tool_use');
const use = message.content.find((block) => block.type === 'tool_use');
isCall(use.name, use.input.city);
const final = await anthropic.messages.stream(ask).finalMessage();
assert.deepEqual(final.content.find((block) => block.type === 'tool_use').input, use.input);

console.log('ok');
