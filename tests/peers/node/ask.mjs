// What a program for Node does with OpenAI's client, against the server whose address is the first argument.
// Prints one JSON object of what its user would see; tests/peers/test_openai_node.py reads it.
import OpenAI from 'openai';

const MODEL = 'smollm2-135m-instruct';
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: 'any-text', maxRetries: 0 });
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const options = { model: MODEL, temperature: 0 };
const weather = {
  name: 'get_weather',
  description: 'The weather in a city.',
  parameters: {
    type: 'object',
    properties: { city: { type: 'string', maxLength: 20 } },
    required: ['city'],
    additionalProperties: false,
  },
};
const city = {
  type: 'object',
  properties: { city: { enum: ['Paris', 'Berlin', 'Rome'] } },
  required: ['city'],
  additionalProperties: false,
};
const seen = {};

seen.models = (await client.models.list()).data.map((model) => model.id);

const whole = await client.chat.completions.create({ ...options, messages, max_tokens: 40 });
seen.whole = whole.choices[0].message.content;
seen.usage = whole.usage;

const stream = await client.chat.completions.create({
  ...options, messages, max_tokens: 40, stream: true, stream_options: { include_usage: true },
});
seen.streamed = '';
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? '';
  seen.streamedUsage = chunk.usage ?? seen.streamedUsage;
}

const called = await client.chat.completions.create({
  ...options,
  messages: [{ role: 'user', content: 'What is the weather in Paris?' }],
  tools: [{ type: 'function', function: weather }],
  tool_choice: 'required',
  max_tokens: 80,
});
seen.call = called.choices[0].message.tool_calls[0].function;

const shaped = await client.chat.completions.create({
  ...options,
  messages: [{ role: 'user', content: 'Which city is the capital of France?' }],
  response_format: { type: 'json_schema', json_schema: { name: 'city', strict: true, schema: city } },
  max_tokens: 60,
});
seen.shaped = shaped.choices[0].message.content;

const events = [];
const responding = client.responses.stream({ ...options, input: messages[0].content, max_output_tokens: 40 });
for await (const event of responding) events.push(event.type);
const response = await responding.finalResponse();
seen.events = [...new Set(events)];
seen.response = response.output_text;

const next = await client.responses.create({
  ...options, input: 'And of Italy?', previous_response_id: response.id, max_output_tokens: 30,
});
seen.next = next.output_text;
seen.previous = next.previous_response_id === response.id;
seen.stored = (await client.responses.retrieve(response.id)).output_text;
const items = await client.responses.inputItems.list(next.id, { order: 'asc' });
seen.items = items.data.map((item) => item.content[0].text);
await client.responses.delete(response.id);

const failures = [
  () => client.responses.retrieve(response.id),
  () => client.chat.completions.create({ ...options, messages, temperature: 9 }),
  () => client.chat.completions.create({ ...options, messages, model: 'gpt-4o' }),
];
seen.errors = [];
for (const fail of failures) {
  try {
    await fail();
    seen.errors.push(null);
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.code, error.param, Boolean(error.requestID)]);
  }
}

const left = await client.chat.completions.create({ ...options, messages, max_tokens: 2000, stream: true });
for await (const chunk of left) {
  if (chunk.choices[0].delta.content) break; // leaving the loop aborts the request
}

console.log(JSON.stringify(seen));
