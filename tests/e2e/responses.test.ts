import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { HumanMessage, ToolMessage, type AIMessageChunk } from '@langchain/core/messages';
import { concat } from '@langchain/core/utils/stream';
import { ChatOpenAI } from '@langchain/openai';
import OpenAI from 'openai';
import { checkEvents, checkResponse } from '../contract/response-check.js';
import { fixture, Server } from './server.js';

let server: Server;
let client: OpenAI;

const ASK = { model: 'pocket-r1', input: 'What is 577 × 63?', temperature: 0 } as const;
/** the longest thinking that the model is known to do: time enough to disturb it */
const LONG = {
  ...ASK,
  input: fixture('greedy.jsonl').toSorted((a, b) => b.output_ids.length - a.output_ids.length)[0].messages,
};
const SEARCH = {
  type: 'function' as const,
  name: 'search',
  description: 'Search the web.',
  parameters: { type: 'object', properties: { query: { type: 'string' } }, required: ['query'] },
  strict: false,
};
const LOOKUP = 'Search the web for violin.';

before(async () => {
  server = await Server.start('--api-key', 'secret');
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'secret', maxRetries: 0 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

test('a whole response and the stream of the same, by the client’s helpers', async () => {
  const whole = await client.responses.create(ASK);
  checkResponse(JSON.parse(JSON.stringify({ ...whole, output_text: undefined })));
  assert.match(whole.output_text, /36351/);
  assert.deepEqual(
    whole.output.map(({ type }) => type),
    ['reasoning', 'message'],
  );
  const events: any[] = [];
  const stream = client.responses.stream(ASK);
  stream.on('event', (event) => events.push(JSON.parse(JSON.stringify(event))));
  const last = await stream.finalResponse();
  checkEvents(events);
  assert.equal(last.output_text, whole.output_text);
  assert.equal(last.usage!.output_tokens, whole.usage!.output_tokens);
  assert.deepEqual(await client.responses.retrieve(whole.id), whole);
});

test('a tool is called in a stream, its output answered, and the conversation goes on', async () => {
  const events: any[] = [];
  const stream = client.responses
    .stream({ ...ASK, input: LOOKUP, tools: [SEARCH] })
    .on('event', (event) => events.push(JSON.parse(JSON.stringify(event))));
  let shown = '';
  stream.on('response.function_call_arguments.delta', ({ snapshot }) => (shown = snapshot));
  const asked = await stream.finalResponse();
  checkEvents(events);
  const call = asked.output.find((item) => item.type === 'function_call')!;
  assert.equal(call.name, 'search');
  assert.equal(shown, call.arguments);
  assert.match(JSON.parse(call.arguments).query, /violin/);

  const result = {
    type: 'function_call_output' as const,
    call_id: call.call_id,
    output: '{"snippet": "Tara wrote 10 pages about violin"}',
  };
  const answered = await client.responses.create({
    ...ASK,
    input: [result],
    tools: [SEARCH],
    previous_response_id: asked.id,
  });
  assert.match(answered.output_text, /Tara wrote 10 pages about violin/);
  // The same without anything stored: all items are sent again.
  const sent = await client.responses.create({
    ...ASK,
    store: false,
    input: [{ role: 'user', content: LOOKUP }, ...(asked.output as OpenAI.Responses.ResponseInputItem[]), result],
    tools: [SEARCH],
  });
  assert.equal(sent.output_text, answered.output_text);
  assert.ok(answered.usage!.input_tokens_details.cached_tokens > 0);
});

test('LangChain over the Responses API: a tool is called in a stream, and its output answered', async () => {
  const configuration = { baseURL: `${server.url}/v1` };
  const model = new ChatOpenAI({ ...ASK, apiKey: 'secret', useResponsesApi: true, configuration });
  const { type, ...search } = SEARCH;
  const agent = model.bindTools([{ type, function: search }]);
  let asked: AIMessageChunk | undefined;
  for await (const chunk of await agent.stream(LOOKUP)) asked = asked ? concat(asked, chunk) : chunk;
  const [call] = asked!.tool_calls!;
  assert.deepEqual([call!.name, call!.args], ['search', { query: 'violin' }]);
  const content = '{"snippet": "Tara wrote 10 pages about violin"}';
  const output = new ToolMessage({ tool_call_id: call!.id!, content });
  const answered = await agent.invoke([new HumanMessage(LOOKUP), asked!, output]);
  assert.match(answered.text, /Tara wrote 10 pages about violin/);
});

test('output held to a schema is parsed by the client', async () => {
  const schema = {
    type: 'object',
    properties: { name: { type: 'string' }, age: { type: 'integer' } },
    required: ['name', 'age'],
    additionalProperties: false,
  };
  const format = { type: 'json_schema' as const, name: 'person', schema, strict: true };
  const { output_text: text } = await client.responses.create({
    ...ASK,
    input: 'Answer in JSON with the fields name and age: Mia is 7 years old.',
    text: { format },
  });
  const person = JSON.parse(text);
  assert.deepEqual(Object.keys(person), ['name', 'age']);
  assert.equal(typeof person.age, 'number');
});

test('a response in the background outlives its client, and its stream is gone on with', async () => {
  const controller = new AbortController();
  const stream = await client.responses.create(
    { ...LONG, background: true, stream: true },
    { signal: controller.signal },
  );
  const seen: any[] = [];
  for await (const event of stream) {
    seen.push(event);
    if (seen.length === 8) break;
  }
  controller.abort();
  const { id } = seen[0].response;
  const rest = await client.responses.retrieve(id, { stream: true, starting_after: 7 });
  for await (const event of rest) seen.push(event);
  const last = checkEvents(seen);
  assert.equal(last.status, 'completed');
  const stored = await client.responses.retrieve(id);
  assert.deepEqual({ ...last, output_text: stored.output_text }, stored);
  const whole = await client.responses.create(LONG);
  assert.equal(whole.output_text, last.output.at(-1).content[0].text);
});

test('cancelled and abandoned responses free their blocks', async () => {
  const schema = { type: 'array', items: { type: 'integer' }, minItems: 1000 };
  const endless = { ...ASK, text: { format: { type: 'json_schema' as const, name: 'list', schema } } };
  const made = await client.responses.create({ ...endless, background: true });
  assert.equal(made.status, 'queued');
  while ((await client.responses.retrieve(made.id)).status === 'queued') await sleep(10);
  const cancelled = await client.responses.cancel(made.id);
  assert.equal(cancelled.status, 'cancelled');
  await idle();
  const controller = new AbortController();
  const stream = await client.responses.create({ ...endless, stream: true }, { signal: controller.signal });
  for await (const event of stream) if (event.type === 'response.reasoning_text.delta') break;
  controller.abort();
  await idle();
  await client.responses.delete(made.id);
  await assert.rejects(client.responses.retrieve(made.id), /404/);
});

/** Waits until nothing runs, for 250 ms at most. */
async function idle(): Promise<void> {
  for (let i = 0; (await server.health()).num_running > 0; i++) {
    assert.ok(i < 25, 'a sequence runs on');
    await sleep(10);
  }
}
