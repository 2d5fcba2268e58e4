import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Drain } from '../../server/api/drain.js';
import { ApiError } from '../../server/errors.js';
import type { EmittedToken } from '../../server/engine/request.js';
import { oneByOne } from './fake-engine.js';
import { eventsOf, startHarness, type Harness } from './harness.js';
import { checkCount, checkError, checkEvents, checkItemList, checkResponse } from './response-check.js';

const ASK = { model: 'pocket-r1', input: 'What is 2 + 2?' };
const TOOL = { type: 'function', name: 'search', description: 'Search the web.', parameters: { type: 'object' } };

interface Answer {
  status: number;
  body: any;
  text: string;
}

async function call(
  { app }: Harness,
  method: 'GET' | 'POST' | 'DELETE',
  path: string,
  body?: unknown,
): Promise<Answer> {
  const sent =
    body === undefined ? {} : { payload: JSON.stringify(body), headers: { 'content-type': 'application/json' } };
  const response = await app.inject({ method, url: `/v1/responses${path}`, ...sent });
  const isJson = String(response.headers['content-type']).startsWith('application/json');
  const answer = {
    status: response.statusCode,
    text: response.body,
    body: isJson ? JSON.parse(response.body) : null,
  };
  if (answer.status >= 400) checkError(answer.body);
  return answer;
}

async function make(harness: Harness, body: object): Promise<any> {
  const { status, body: response, text } = await call(harness, 'POST', '', { ...ASK, ...body });
  assert.equal(status, 200, text);
  checkResponse(response);
  return response;
}

async function stream(harness: Harness, body: object): Promise<any[]> {
  const { status, text } = await call(harness, 'POST', '', { ...ASK, ...body, stream: true });
  assert.equal(status, 200, text);
  return eventsOf(text);
}

function callTokens(harness: Harness, ...calls: [name: string, args: string][]): EmittedToken[] {
  const one = ([name, args]: [string, string]): EmittedToken[] => [
    { id: 9, phase: 'tool' },
    ...harness.tokens(name, 'tool'),
    { id: 11, phase: 'tool' },
    ...harness.tokens(args, 'tool'),
    { id: 10, phase: 'tool' },
  ];
  return [
    ...harness.tokens('I search.', 'reasoning'),
    { id: 6, phase: 'control' },
    { id: 7, phase: 'control' },
    ...calls.flatMap(one),
    { id: 8, phase: 'control' },
    { id: 1, phase: 'control' },
  ];
}

const promptOf = ({ engine, prompts }: Harness, at = -1): string =>
  Buffer.concat(engine.requests.at(at)!.promptIds.map((id) => prompts.tokenizer.bytesOf(id))).toString();

test('a whole response: reasoning and text as items, usage, what was asked', async () => {
  const harness = startHarness();
  const response = await make(harness, {
    metadata: { a: 'b' },
    temperature: 0.5,
    seed: 7,
    reasoning: { effort: 'low' },
  });
  assert.deepEqual(
    response.output.map(({ type, status }: any) => [type, status]),
    [
      ['reasoning', 'completed'],
      ['message', 'completed'],
    ],
  );
  const [reasoning, message] = response.output;
  assert.deepEqual(reasoning.content, [{ type: 'reasoning_text', text: 'Let me see.' }]);
  assert.deepEqual(message.content, [{ type: 'output_text', text: 'It is 4.', annotations: [], logprobs: [] }]);
  assert.match(response.id, /^resp_[0-9a-f]{32}$/);
  assert.deepEqual([response.status, response.seed, response.temperature], ['completed', 7, 0.5]);
  assert.deepEqual([response.metadata, response.reasoning.effort, response.store], [{ a: 'b' }, 'low', true]);
  const numPrompt = harness.engine.requests[0]!.promptIds.length;
  const { usage } = response;
  assert.deepEqual([usage.input_tokens, usage.input_tokens_details.cached_tokens], [numPrompt, 2]);
  assert.ok(usage.output_tokens_details.reasoning_tokens > 0);
  assert.equal(usage.total_tokens, numPrompt + usage.output_tokens);
  await harness.close();
});

test('the stream of the same: every event in its place, the response at the end', async () => {
  const harness = startHarness();
  const events = await stream(harness, { seed: 7 });
  const last = checkEvents(events);
  const types: string[] = [];
  for (const { type } of events) if (types.at(-1) !== type) types.push(type);
  assert.deepEqual(types, [
    'response.created',
    'response.in_progress',
    'response.output_item.added',
    'response.content_part.added',
    'response.reasoning_text.delta',
    'response.reasoning_text.done',
    'response.content_part.done',
    'response.output_item.done',
    'response.output_item.added',
    'response.content_part.added',
    'response.output_text.delta',
    'response.output_text.done',
    'response.content_part.done',
    'response.output_item.done',
    'response.completed',
  ]);
  const whole = await make(harness, { seed: 7 });
  const known = (response: any): object => ({
    ...response,
    ...{ id: null, created_at: null, completed_at: null },
    output: response.output.map((item: object) => ({ ...item, id: null })),
  });
  assert.deepEqual(known(last), known(whole));
  await harness.close();
});

test('the name of each event stands beside its data', async () => {
  const harness = startHarness();
  const { text } = await call(harness, 'POST', '', { ...ASK, stream: true });
  for (const block of text.trim().split('\n\n')) {
    const [, name, data] = /^event: (\S+)\ndata: (.*)$/.exec(block)!;
    assert.equal(JSON.parse(data!).type, name);
  }
  await harness.close();
});

test('calls of functions, whole and streamed, and their outputs sent back', async () => {
  const harness = startHarness();
  const calls: [string, string][] = [
    ['search', '{"query": "a"}'],
    ['search', '{}'],
  ];
  harness.engine.script = oneByOne(callTokens(harness, ...calls));
  const response = await make(harness, { tools: [TOOL] });
  const made = response.output.filter(({ type }: any) => type === 'function_call');
  assert.deepEqual(
    made.map((item: any) => [item.name, item.arguments, item.status]),
    calls.map(([name, args]) => [name, args, 'completed']),
  );
  assert.equal(response.status, 'completed');
  assert.deepEqual(response.tools, [{ ...TOOL, strict: false }]);
  const last = checkEvents(await stream(harness, { tools: [TOOL] }));
  assert.deepEqual(
    last.output.map(({ type, arguments: args }: any) => [type, args]),
    response.output.map(({ type, arguments: args }: any) => [type, args]),
  );

  harness.engine.script = oneByOne(harness.thought('Good.', 'Found it.'));
  const outputs = made.map(({ call_id }: any, index: number) => ({
    type: 'function_call_output',
    call_id,
    output: `result ${index}`,
  }));
  const swapped = outputs.toReversed();
  await make(harness, { tools: [TOOL], input: swapped, previous_response_id: response.id });
  const chained = promptOf(harness);
  assert.match(chained, /What is 2 \+ 2\?[^]*search[^]*result 0[^]*result 1/);
  const user = { role: 'user', content: ASK.input };
  await make(harness, { tools: [TOOL], input: [user, ...response.output, ...outputs] });
  assert.equal(promptOf(harness), chained);

  const missing = await call(harness, 'POST', '', { ...ASK, input: 'go on', previous_response_id: response.id });
  assert.deepEqual([missing.status, missing.body.error.param], [400, 'input']);
  await harness.close();
});

test('a response goes on with one before it, any number of turns', async () => {
  const harness = startHarness();
  const first = await make(harness, { instructions: 'Be short.' });
  assert.match(promptOf(harness), /Be short\./);
  const second = await make(harness, { input: 'And 3 + 3?', previous_response_id: first.id });
  assert.doesNotMatch(promptOf(harness), /Be short\./);
  assert.match(promptOf(harness), /What is 2 \+ 2\?[^]*It is 4\.[^]*And 3 \+ 3\?/);
  assert.equal(second.previous_response_id, first.id);
  await make(harness, { input: [{ role: 'user', content: 'Sure?' }], previous_response_id: second.id });
  assert.match(promptOf(harness), /2 \+ 2\?[^]*It is 4\.[^]*And 3 \+ 3\?[^]*It is 4\.[^]*Sure\?/);

  const again = await make(harness, {
    input: [
      { role: 'user', content: 'x' },
      { type: 'item_reference', id: first.output[1].id },
      { role: 'user', content: 'y' },
    ],
    previous_response_id: first.id,
  });
  assert.equal((promptOf(harness).match(/It is 4\./g) ?? []).length, 2);
  assert.equal(again.status, 'completed');

  const unstored = await make(harness, { store: false });
  assert.equal(unstored.store, false);
  for (const id of [unstored.id, 'resp_none']) {
    const { status, body } = await call(harness, 'POST', '', { ...ASK, previous_response_id: id });
    assert.deepEqual(
      [status, body.error.code, body.error.param],
      [400, 'previous_response_not_found', 'previous_response_id'],
    );
  }
  await call(harness, 'DELETE', `/${first.id}`);
  const gone = await call(harness, 'POST', '', { ...ASK, previous_response_id: second.id });
  assert.equal(gone.body.error.code, 'previous_response_not_found');
  assert.match(gone.body.error.message, new RegExp(first.id));
  await harness.close();
});

test('reasoning comes back encoded where it is asked for, and is taken so', async () => {
  const harness = startHarness();
  const response = await make(harness, { store: false, include: ['reasoning.encrypted_content'] });
  const [{ encrypted_content: encoded, id }, message] = response.output;
  assert.equal(typeof encoded, 'string');
  const items = (reasoning: object): object[] => [
    { role: 'user', content: ASK.input },
    reasoning,
    message,
    { role: 'user', content: 'Sure?' },
  ];
  await make(harness, { input: items({ type: 'reasoning', id, summary: [], encrypted_content: encoded }) });
  const fromEncoded = promptOf(harness);
  await make(harness, { input: items(response.output[0]) });
  assert.equal(promptOf(harness), fromEncoded);
  const { status, body } = await call(harness, 'POST', '', {
    ...ASK,
    input: items({ type: 'reasoning', summary: [], encrypted_content: 'gAAAA' }),
  });
  assert.deepEqual([status, body.error.param], [400, 'input[1].encrypted_content']);
  await harness.close();
});

test('the limit of tokens leaves an incomplete response, logprobs come on request', async () => {
  const harness = startHarness();
  const logprobs = { logprob: -0.5, top: [{ id: 100, logprob: -0.1 }] };
  const tokens = harness.thought('Let me', 'It is é 4').map((token) => ({ ...token, logprobs }));
  harness.engine.script = oneByOne(tokens.slice(0, -1), 'length');
  const body = { max_output_tokens: 20, include: ['message.output_text.logprobs'], top_logprobs: 1 };
  const response = await make(harness, body);
  assert.deepEqual([response.status, response.incomplete_details], ['incomplete', { reason: 'max_output_tokens' }]);
  assert.equal(response.output.at(-1).status, 'incomplete');
  const [part] = response.output.at(-1).content;
  assert.equal(Buffer.from(part.logprobs.flatMap(({ bytes }: any) => bytes)).toString(), part.text);
  assert.equal(part.logprobs[0].top_logprobs.length, 1);
  const last = checkEvents(await stream(harness, body));
  assert.deepEqual(last.output.at(-1).content, response.output.at(-1).content);
  await harness.close();
});

test('a format of the text becomes the grammar of the answer', async () => {
  const harness = startHarness();
  const schema = {
    type: 'object',
    properties: { a: { type: 'integer' } },
    required: ['a'],
    additionalProperties: false,
  };
  const format = { type: 'json_schema', name: 'answer', schema, strict: true };
  const response = await make(harness, { text: { format } });
  assert.ok(harness.engine.requests[0]!.grammar);
  assert.deepEqual(response.text.format, format);
  await make(harness, { text: { format: { type: 'text' } } });
  assert.equal(harness.engine.requests[1]!.grammar, undefined);
  await make(harness, { tools: [TOOL], tool_choice: { type: 'function', name: 'search' } });
  assert.ok(harness.engine.requests[2]!.grammar);
  await harness.close();
});

test('what cannot be served is refused by the name of its field', async () => {
  const harness = startHarness();
  const user = { role: 'user', content: 'x' };
  const rows: [object, string | null, string?][] = [
    [{ input: undefined }, 'input'],
    [{ input: [] }, 'input'],
    [{ input: [{ role: 'user', content: [{ type: 'input_image', image_url: 'x' }] }] }, 'input[0].content[0]'],
    [{ input: [{ type: 'web_search_call' }] }, 'input[0].type', 'unsupported_value'],
    [{ input: [user, { type: 'function_call_output', call_id: 'c', output: 'x' }] }, 'input'],
    [{ input: [{ role: 'robot', content: 'x' }] }, 'input[0].role'],
    [{ model: 'other' }, 'model', 'model_not_found'],
    [{ n: 2 }, 'n', 'unsupported_value'],
    [{ stop: 'x' }, 'stop', 'unsupported_parameter'],
    [{ conversation: 'c' }, 'conversation'],
    [{ prompt: { id: 'p' } }, 'prompt'],
    [{ truncation: 'auto' }, 'truncation'],
    [{ context_management: [] }, 'context_management'],
    [{ generate: false }, 'generate', 'unsupported_value'],
    [{ stream_id: 'a' }, 'stream_id', 'unsupported_parameter'],
    [{ service_tier: 'priority' }, 'service_tier'],
    [{ include: ['file_search_call.results'] }, 'include[0]'],
    [{ reasoning: { summary: 'detailed' } }, 'reasoning.summary', 'unsupported_value'],
    [{ reasoning: { effort: 'huge' } }, 'reasoning.effort'],
    [{ text: { verbosity: 'low' } }, 'text.verbosity'],
    [{ text: { format: { type: 'json_schema', name: 'x' } } }, 'text.format.schema'],
    [{ text: { format: { type: 'json_schema', name: 'x', schema: { type: 'nothing' } } } }, 'text.format.schema'],
    [{ tools: [{ type: 'web_search' }] }, 'tools[0].type', 'unsupported_value'],
    [{ tools: [{ type: 'function' }] }, 'tools[0].name'],
    [{ tools: [{ ...TOOL, strict: true, parameters: { type: 'nothing' } }] }, 'tools[0].parameters'],
    [{ tools: [TOOL], tool_choice: { type: 'file_search' } }, 'tool_choice.type', 'unsupported_value'],
    [{ tools: [TOOL], tool_choice: { type: 'function', name: 'none' } }, 'tool_choice'],
    [{ tool_choice: 'required' }, 'tool_choice'],
    [{ max_output_tokens: 100_000 }, 'max_output_tokens', 'context_length_exceeded'],
    [{ max_output_tokens: 0 }, 'max_output_tokens'],
    [{ max_tokens: 5 }, 'max_tokens'],
    [{ input: 'many words '.repeat(20_000) }, 'input', 'context_length_exceeded'],
    [{ metadata: { a: 1 } }, 'metadata.a'],
    [{ background: true, store: false }, 'background'],
    [{ stream_options: { include_obfuscation: true } }, 'stream_options.include_obfuscation'],
    [{ temperature: 3 }, 'temperature'],
  ];
  for (const [body, param, code] of rows) {
    const { status, body: answer } = await call(harness, 'POST', '', { ...ASK, ...body });
    assert.ok(status >= 400 && status < 500, JSON.stringify(body).slice(0, 200));
    assert.equal(answer.error.param, param, JSON.stringify([body, answer]).slice(0, 500));
    if (code !== undefined) assert.equal(answer.error.code, code);
    assert.doesNotMatch(answer.error.message, /messages|response_format|max_completion_tokens|\.function\./);
  }
  assert.equal(harness.engine.requests.length, 0);
  await harness.close();
});

test('a failure before the first token has a status, one after it is an event', async () => {
  const harness = startHarness();
  harness.engine.submitError = new ApiError('queue_full', 'Too many requests wait.');
  assert.equal((await call(harness, 'POST', '', ASK)).status, 429);
  harness.engine.submitError = null;
  harness.engine.script = function* () {
    yield { tokens: harness.tokens('I think', 'reasoning') };
    yield { finishReason: 'error', error: { code: 'engine_failed', message: 'The engine broke.' } };
  };
  const last = checkEvents(await stream(harness, {}));
  assert.deepEqual([last.status, last.error], ['failed', { code: 'server_error', message: 'The engine broke.' }]);
  assert.equal(last.output[0].status, 'incomplete');
  assert.equal((await call(harness, 'GET', `/${last.id}`)).body.status, 'failed');
  assert.equal((await call(harness, 'POST', '', ASK)).status, 500);
  await harness.close();
});

test('a whole response that fails late is one that says so', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 10, stallMs: 1000 } });
  harness.engine.script = function* () {
    yield new Promise<void>((resolve) => setTimeout(resolve, 50));
    yield { finishReason: 'error', error: { code: 'engine_failed', message: 'The engine broke.' } };
  };
  const response = await make(harness, {});
  assert.deepEqual([response.status, response.error.message], ['failed', 'The engine broke.']);
  assert.deepEqual((await call(harness, 'GET', `/${response.id}`)).body, response);
  await harness.close();
});

test('a stored response can be read, listed and deleted, by its own key alone', async () => {
  const harness = startHarness({ args: ['--api-key', 'one', '--api-key', 'two'] });
  const as = async (key: string, method: 'GET' | 'POST' | 'DELETE', path: string, body?: object): Promise<Answer> => {
    const response = await harness.app.inject({
      method,
      url: `/v1/responses${path}`,
      headers: { authorization: `Bearer ${key}` },
      ...(body === undefined ? {} : { payload: body }),
    });
    return { status: response.statusCode, text: response.body, body: JSON.parse(response.body) };
  };
  const input = [
    { role: 'user', content: 'a' },
    { role: 'assistant', content: 'b' },
    { role: 'user', content: 'c' },
  ];
  const { body: made } = await as('one', 'POST', '', { ...ASK, input, seed: 2 ** 40 });
  assert.deepEqual((await as('one', 'GET', `/${made.id}`)).body, made);
  const list = await as('one', 'GET', `/${made.id}/input_items?order=asc&limit=2`);
  checkItemList(list.body);
  assert.deepEqual(
    list.body.data.map(({ role, content }: any) => [role, content[0].text]),
    [
      ['user', 'a'],
      ['assistant', 'b'],
    ],
  );
  assert.equal(list.body.has_more, true);
  const rest = await as('one', 'GET', `/${made.id}/input_items?order=asc&after=${list.body.last_id}`);
  assert.deepEqual([rest.body.data.length, rest.body.has_more], [1, false]);
  const newest = await as('one', 'GET', `/${made.id}/input_items`);
  assert.equal(newest.body.data[0].content[0].text, 'c');
  for (const query of ['limit=0', 'limit=x', 'order=up', 'after=none']) {
    assert.equal((await as('one', 'GET', `/${made.id}/input_items?${query}`)).status, 400, query);
  }
  for (const [method, path] of [
    ['GET', ''],
    ['DELETE', ''],
    ['POST', '/cancel'],
    ['GET', '/input_items'],
  ] as const) {
    assert.equal((await as('two', method, `/${made.id}${path}`)).status, 404, `${method} ${path}`);
  }
  assert.equal((await as('two', 'POST', '', { ...ASK, previous_response_id: made.id })).status, 400);
  assert.equal((await as('one', 'POST', `/${made.id}/cancel`)).status, 400);
  assert.equal((await as('one', 'GET', `/${made.id}?stream=true`)).status, 400);
  assert.equal((await as('one', 'GET', `/${made.id}?include[]=reasoning.encrypted_content`)).status, 400);
  assert.deepEqual((await as('one', 'DELETE', `/${made.id}`)).body, { id: made.id, object: 'response', deleted: true });
  assert.equal((await as('one', 'GET', `/${made.id}`)).status, 404);
  await harness.close();
});

test('a store that breaks is logged, and the responses are made all the same', async () => {
  const lines: string[] = [];
  const broken = {
    put: () => {
      throw new Error('the disk is full');
    },
    get: () => undefined,
    delete: () => {},
    close: () => {},
  };
  const logger = { level: 'error', stream: { write: (line: string) => void lines.push(line) } };
  const harness = startHarness({ responses: broken, logger });
  assert.equal((await make(harness, {})).status, 'completed');
  assert.equal(checkEvents(await stream(harness, {})).status, 'completed');
  assert.equal(lines.filter((line) => line.includes('the disk is full')).length, 2);
  await harness.close();
});

test('input tokens are counted as a response would have them', async () => {
  const harness = startHarness();
  const { status, body } = await call(harness, 'POST', '/input_tokens', { ...ASK, tools: [TOOL] });
  assert.equal(status, 200);
  checkCount(body);
  await make(harness, { tools: [TOOL] });
  assert.equal(body.input_tokens, harness.engine.requests[0]!.promptIds.length);
  await harness.close();
});

test('in the background: queued, in progress, completed; its events from anywhere on', async () => {
  const harness = startHarness();
  let go = (): void => {};
  const tokens = harness.thought('Let me see.', 'It is 4.');
  harness.engine.script = function* () {
    yield new Promise<void>((resolve) => (go = resolve));
    yield { tokens: tokens.slice(0, 3), cachedTokens: 2 };
    yield new Promise<void>((resolve) => (go = resolve));
    yield { tokens: tokens.slice(3), finishReason: 'stop' };
  };
  const made = await make(harness, { background: true });
  assert.deepEqual([made.status, made.background, made.output], ['queued', true, []]);
  const get = async (): Promise<any> => (await call(harness, 'GET', `/${made.id}`)).body;
  assert.equal((await get()).status, 'queued');
  const waiting = call(harness, 'POST', '', { ...ASK, previous_response_id: made.id });
  assert.equal((await waiting).status, 400);
  const live = call(harness, 'GET', `/${made.id}?stream=true`);
  go();
  await sleep(5);
  const half = await get();
  checkResponse(half);
  assert.deepEqual([half.status, half.output[0].status], ['in_progress', 'in_progress']);
  go();
  await sleep(5);
  const done = await get();
  checkResponse(done);
  assert.equal(done.status, 'completed');
  const events = eventsOf((await live).text);
  assert.deepEqual(checkEvents(events), done);
  assert.equal(events[1].type, 'response.queued');
  const rest = await call(harness, 'GET', `/${made.id}?stream=true&starting_after=4`);
  assert.deepEqual(eventsOf(rest.text), events.slice(5));
  assert.equal((await call(harness, 'GET', `/${made.id}?stream=true&starting_after=999`)).status, 400);
  assert.equal((await call(harness, 'GET', `/${made.id}?starting_after=1`)).status, 400);
  await harness.close();
});

test('a response in the background can be cancelled, deleted, and read while it is made', async () => {
  const harness = startHarness();
  const tokens = harness.thought('Let me see.', 'It is 4.');
  harness.engine.script = function* () {
    yield { tokens: tokens.slice(0, 3), cachedTokens: 2 };
    yield new Promise<void>(() => {});
  };
  const made = await make(harness, { background: true });
  await sleep(5);
  const live = call(harness, 'GET', `/${made.id}?stream=true`);
  await sleep(5);
  const { body: cancelled } = await call(harness, 'POST', `/${made.id}/cancel`);
  checkResponse(cancelled);
  assert.deepEqual([cancelled.status, cancelled.output[0].status], ['cancelled', 'incomplete']);
  assert.ok(harness.engine.aborted.includes(made.id));
  assert.deepEqual((await call(harness, 'GET', `/${made.id}`)).body, cancelled);
  assert.deepEqual((await call(harness, 'POST', `/${made.id}/cancel`)).body, cancelled);
  assert.deepEqual(checkEvents(eventsOf((await live).text)), cancelled);

  const other = await make(harness, { background: true });
  await call(harness, 'DELETE', `/${other.id}`);
  assert.ok(harness.engine.aborted.includes(other.id));
  await sleep(5);
  assert.equal((await call(harness, 'GET', `/${other.id}`)).status, 404);
  await harness.close();
});

test('what runs in the background is waited for at shutdown, and then ended', async () => {
  const drain = new Drain();
  const harness = startHarness({ drain });
  harness.engine.script = function* () {
    yield { tokens: harness.tokens('Let', 'reasoning') };
    yield new Promise<void>((resolve) => setTimeout(resolve, 30));
    yield { finishReason: 'stop' };
  };
  const made = await make(harness, { background: true });
  assert.equal(drain.numRunning, 1);
  await drain.begin(1000);
  assert.equal((await call(harness, 'GET', `/${made.id}`)).body.status, 'completed');
  assert.equal((await call(harness, 'POST', '', ASK)).status, 503);
  await harness.close();
});
