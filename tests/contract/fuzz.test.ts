import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { Frames } from '../helpers/frames.js';
import { oneByOne } from './fake-engine.js';
import { DOCUMENT, eventsOf, startHarness, validatorsOf } from './harness.js';

const validators = validatorsOf(DOCUMENT);
const isError = validators('Error');
const isCompletion = validators('ChatCompletion');

const FULL: Record<string, unknown> = {
  model: 'pocket-r1',
  messages: [
    { role: 'system', content: 'a' },
    { role: 'user', content: [{ type: 'text', text: 'b' }], name: 'n' },
    {
      role: 'assistant',
      content: null,
      reasoning_content: 'c',
      tool_calls: [{ id: 'i', type: 'function', function: { name: 'f', arguments: '{}' } }],
    },
    { role: 'tool', content: 'd', tool_call_id: 'i' },
  ],
  stream: false,
  max_tokens: 5,
  min_tokens: 1,
  temperature: 0.5,
  top_p: 0.5,
  top_k: 5,
  min_p: 0.1,
  presence_penalty: 0,
  frequency_penalty: 0,
  repetition_penalty: 1,
  logit_bias: { '5': 1 },
  seed: 7,
  stop: ['x'],
  stop_token_ids: [3],
  ignore_eos: false,
  logprobs: true,
  top_logprobs: 2,
  n: 1,
  tools: [{ type: 'function', function: { name: 'f', description: 'g', parameters: { type: 'object' } } }],
  tool_choice: 'auto',
  thinking: { type: 'enabled' },
  chat_template_kwargs: { thinking: true },
  return_token_ids: true,
  cache_salt: 's',
  user: 'u',
  metadata: { a: 'b' },
};

/** every place in the request, as a list of keys */
function placesOf(value: unknown, path: (string | number)[] = []): (string | number)[][] {
  if (typeof value !== 'object' || value === null) return [path];
  const entries = Array.isArray(value) ? [...value.entries()] : Object.entries(value);
  return [...(path.length ? [path] : []), ...entries.flatMap(([key, item]) => placesOf(item, [...path, key]))];
}

function changed(path: readonly (string | number)[], value: unknown, full = FULL): unknown {
  const body = structuredClone(full);
  let node: any = body;
  for (const key of path.slice(0, -1)) node = node[key];
  if (value === undefined) delete node[path.at(-1)!];
  else node[path.at(-1)!] = value;
  return body;
}

const odd = fc.oneof(
  fc.jsonValue({ maxDepth: 3 }),
  fc.constantFrom<unknown>(
    undefined, null, true, '', 0, -0, -1, 1.5, 2 ** 31, -(2 ** 31), 2 ** 53, 1e308, -1e308, 5e-324, [], {}, [[]], [{}], [null],
    '\u0000', '\ud800', '\ufdd0', '</think>', '__proto__', 'constructor', { toString: 1 }, { role: 'user' }, { type: 'text' }, 'x'.repeat(5000),
  ), // prettier-ignore
  fc.string({ unit: 'binary', maxLength: 20 }),
);

test('whatever is sent, the answer is a completion or an error that names a client’s mistake', async () => {
  const harness = startHarness();
  harness.engine.script = oneByOne(harness.thought('a', 'b'));
  assert.equal((await harness.chat(FULL)).status, 200);
  const places = placesOf(FULL);
  assert.ok(places.length > 50);
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(...places), odd, fc.boolean(), async (path, value, stream) => {
      const body = changed(path, value) as Record<string, unknown>;
      if (stream && path[0] !== 'stream') body['stream'] = true;
      const response = await harness.chat(body);
      if (response.status === 200) {
        if (String(response.headers['content-type']).startsWith('text/event-stream')) {
          assert.equal(eventsOf(response.text).at(-1), '[DONE]');
        } else assert.ok(isCompletion(response.body), JSON.stringify(isCompletion.errors));
        return;
      }
      assert.ok(response.status >= 400 && response.status < 500, response.text);
      assert.ok(isError(response.body), response.text);
      assert.notEqual((response.body as any).error.message, '');
    }),
    { numRuns: 1500 },
  );
  await harness.close();
});

const RESPONSE: Record<string, unknown> = {
  model: 'pocket-r1',
  instructions: 'Be short.',
  input: [
    { role: 'user', content: 'a' },
    { type: 'reasoning', id: 'rs', summary: [], content: [{ type: 'reasoning_text', text: 'b' }] },
    { type: 'function_call', id: 'fc', call_id: 'c', name: 'f', arguments: '{}', status: 'completed' },
    { type: 'function_call_output', call_id: 'c', output: [{ type: 'input_text', text: 'd' }] },
    { type: 'message', role: 'assistant', content: [{ type: 'output_text', text: 'e', annotations: [] }] },
    { type: 'message', role: 'developer', content: [{ type: 'input_text', text: 'f' }] },
  ],
  previous_response_id: null,
  store: true,
  max_output_tokens: 50,
  temperature: 0.5,
  seed: 7,
  top_logprobs: 1,
  include: ['reasoning.encrypted_content', 'message.output_text.logprobs'],
  reasoning: { effort: 'low', summary: 'auto' },
  text: { format: { type: 'text' }, verbosity: 'medium' },
  tools: [{ type: 'function', name: 'f', description: 'g', parameters: { type: 'object' }, strict: false }],
  tool_choice: { type: 'allowed_tools', mode: 'auto', tools: [{ type: 'function', name: 'f' }] },
  parallel_tool_calls: true,
  metadata: { a: 'b' },
};

test('whatever is sent to /v1/responses, the answer is a response or an error that names a client’s mistake', async () => {
  const { app, engine, thought, close } = startHarness();
  engine.script = oneByOne(thought('a', 'b'));
  const isResponse = validators('Response');
  const send = (body: unknown) => app.inject({ method: 'POST', url: '/v1/responses', payload: body as object });
  assert.equal((await send(RESPONSE)).statusCode, 200);
  const places = placesOf(RESPONSE);
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(...places), odd, async (path, value) => {
      const { statusCode, body } = await send(changed(path, value, RESPONSE));
      if (statusCode === 200 && body.startsWith('{')) assert.ok(isResponse(JSON.parse(body)), body);
      else if (statusCode !== 200) {
        assert.ok(statusCode >= 400 && statusCode < 500, body);
        assert.ok(isError(JSON.parse(body)), body);
      }
    }),
    { numRuns: 700 },
  );
  await close();
});

test('whatever frame is sent over a WebSocket, it gets a response or an error frame, and the socket lives on', async () => {
  const { engine, thought, listen, close } = startHarness();
  engine.script = oneByOne(thought('a', 'b'));
  const client = await Frames.open(await listen());
  const isErrorFrame = validators('ResponsesErrorFrame');
  const create = { type: 'response.create', stream_id: 'a', generate: true, stream: true, ...RESPONSE };
  const control = {
    type: 'response.control',
    action: 'extend_thinking',
    tokens: 5,
    response_id: 'resp',
    stream_id: 'a',
  };
  const frames = [create, control].flatMap((frame) => placesOf(frame).map((path) => [frame, path] as const));
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(...frames), odd, async ([frame, path], value) => {
      client.all.length = 0;
      client.send(changed(path, value, frame) as object);
      const answer = await client.until(
        ({ type }) => type === 'error' || /\.(completed|incomplete|failed)$/.test(type),
      );
      if (answer.type !== 'error') return;
      const { status } = answer;
      assert.ok(isErrorFrame(answer), JSON.stringify(answer));
      assert.ok(status >= 400 && status < 500, JSON.stringify(answer));
    }),
    { numRuns: 400 },
  );
  await client.close();
  await close();
});

test('bytes that are no JSON are the client’s mistake', async () => {
  const { chat, close } = startHarness();
  const text = JSON.stringify(FULL);
  await fc.assert(
    fc.asyncProperty(fc.nat(text.length - 1), fc.string({ unit: 'binary', maxLength: 3 }), async (at, junk) => {
      const { status, body } = await chat(text.slice(0, at) + junk + text.slice(at + 1));
      assert.ok(status === 200 || (status >= 400 && status < 500));
      if (status !== 200) assert.ok(isError(body));
    }),
    { numRuns: 500 },
  );
  await close();
});
