import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { EmittedToken } from '../../server/engine/request.js';
import { oneByOne } from './fake-engine.js';
import { DOCUMENT, eventsOf, QUESTION, startHarness, validatorsOf } from './harness.js';

const ours = validatorsOf(DOCUMENT);
const openaiDocument = process.env['RODIN_OPENAI_SPEC'];
const theirs = openaiDocument ? validatorsOf(openaiDocument) : null;

function check(name: string, openaiName: string, body: unknown): void {
  for (const [whose, validators, schema] of [
    ['our', ours, name],
    ['OpenAI’s', theirs, openaiName],
  ] as const) {
    if (validators === null) continue;
    const validate = validators(schema);
    assert.ok(validate(body), `${whose} ${schema}: ${JSON.stringify(validate.errors)}\n${JSON.stringify(body)}`);
  }
}

const checkWhole = (body: unknown): void => check('ChatCompletion', 'CreateChatCompletionResponse', body);
const checkChunk = (body: unknown): void => check('ChatCompletionChunk', 'CreateChatCompletionStreamResponse', body);
const checkError = (body: unknown): void => check('Error', 'ErrorResponse', body);

test('a whole completion: reasoning, answer, usage, seed', async () => {
  const { chat, engine, close } = startHarness();
  const { status, body } = await chat(QUESTION);
  assert.equal(status, 200);
  checkWhole(body);
  const [choice] = body.choices;
  assert.deepEqual(choice.message, {
    role: 'assistant',
    content: 'It is 4.',
    reasoning_content: 'Let me see.',
    refusal: null,
  });
  assert.equal(choice.finish_reason, 'stop');
  const numPrompt = engine.requests[0]!.promptIds.length;
  const { usage } = body;
  const numReasoning = usage.completion_tokens_details.reasoning_tokens;
  assert.ok(numReasoning > 0 && numReasoning < usage.completion_tokens);
  assert.deepEqual(
    [usage.prompt_tokens, usage.total_tokens, usage.prompt_tokens_details.cached_tokens],
    [numPrompt, numPrompt + usage.completion_tokens, 2],
  );
  assert.deepEqual([usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens], [2, numPrompt - 2]);
  assert.equal(BigInt(body.seed), engine.requests[0]!.sampling.seed);
  assert.ok(Number.isSafeInteger(body.seed));
  assert.match(body.system_fingerprint, /^fp_[0-9a-f]{16}$/);
  await close();
});

test('the stream of the same: role first, one kind a delta, usage last, [DONE]', async () => {
  const { chat, close } = startHarness();
  const { status, text, headers } = await chat({ ...QUESTION, stream: true, stream_options: { include_usage: true } });
  assert.equal(status, 200);
  assert.match(headers['content-type'], /^text\/event-stream/);
  const events = eventsOf(text);
  assert.equal(events.at(-1), '[DONE]');
  const chunks = events.slice(0, -1);
  chunks.forEach(checkChunk);
  const usage = chunks.pop();
  assert.deepEqual(usage.choices, []);
  assert.ok(usage.usage.completion_tokens_details.reasoning_tokens > 0);
  for (const chunk of chunks) assert.equal(chunk.usage, null);
  const deltas = chunks.map((chunk) => chunk.choices[0].delta);
  assert.equal(deltas[0].role, 'assistant');
  assert.ok(deltas.slice(1).every((delta) => delta.role === undefined));
  assert.ok(deltas.every((delta) => !('content' in delta && 'reasoning_content' in delta)));
  assert.equal(deltas.map((delta) => delta.reasoning_content ?? '').join(''), 'Let me see.');
  assert.equal(deltas.map((delta) => delta.content ?? '').join(''), 'It is 4.');
  assert.deepEqual(deltas.at(-1), {});
  assert.deepEqual(chunks.map((chunk) => chunk.choices[0].finish_reason).filter(Boolean), ['stop']);
  assert.ok(Number.isSafeInteger(chunks[0].seed));
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  await close();
});

test('without include_usage no chunk has usage', async () => {
  const { chat, close } = startHarness();
  const { text } = await chat({ ...QUESTION, stream: true });
  assert.ok(eventsOf(text).every((event) => event === '[DONE]' || !('usage' in event)));
  await close();
});

test('how tokens are spread over events changes nothing but the chunks', async () => {
  const harness = startHarness();
  const logprobs = { logprob: -0.5, top: [] };
  const tokens = harness.thought('é 苹果 2 + 2', '😀 = **4**, END of it').map((token) => ({ ...token, logprobs }));
  const body = { ...QUESTION, stream: true, stop: ['END'], logprobs: true, return_token_ids: true };
  const results: unknown[] = [];
  for (let size = 1; size <= tokens.length; size++) {
    harness.engine.script = function* () {
      for (let i = 0; i < tokens.length; i += size) {
        yield { tokens: tokens.slice(i, i + size), ...(i + size >= tokens.length ? { finishReason: 'stop' } : {}) };
      }
    };
    const chunks = eventsOf((await harness.chat(body)).text).slice(0, -1);
    chunks.forEach(checkChunk);
    const choices = chunks.map((chunk) => chunk.choices[0]);
    results.push({
      reasoning: choices.map(({ delta }) => delta.reasoning_content ?? '').join(''),
      content: choices.map(({ delta }) => delta.content ?? '').join(''),
      ids: choices.flatMap((choice) => choice.token_ids),
      content_logprobs: choices.flatMap((choice) => choice.logprobs?.content ?? []),
      reasoning_logprobs: choices.flatMap((choice) => choice.logprobs?.reasoning_content ?? []),
      finish: choices.at(-1).finish_reason,
    });
  }
  for (const result of results) assert.deepEqual(result, results[0]);
  const { body: whole } = await harness.chat({ ...body, stream: false });
  checkWhole(whole);
  const [choice] = whole.choices;
  assert.deepEqual(results[0], {
    reasoning: choice.message.reasoning_content,
    content: choice.message.content,
    ids: choice.token_ids,
    content_logprobs: choice.logprobs.content,
    reasoning_logprobs: choice.logprobs.reasoning_content,
    finish: 'stop',
  });
  assert.equal(choice.message.content, '😀 = **4**, ');
  assert.equal(whole.usage.completion_tokens, choice.token_ids.length);
  await harness.close();
});

test('logprobs carry bytes that make up the text', async () => {
  const harness = startHarness();
  const top = [
    { id: 100, logprob: -0.1 },
    { id: 101, logprob: -Infinity },
  ];
  const tokens = harness.tokens('né 苹', 'answer').map((token) => ({ ...token, logprobs: { logprob: -1, top } }));
  harness.engine.script = oneByOne(tokens, 'length');
  const { body } = await harness.chat({ ...QUESTION, logprobs: true, top_logprobs: 2 });
  checkWhole(body);
  const { content } = body.choices[0].logprobs;
  assert.equal(Buffer.from(content.flatMap((entry: any) => entry.bytes)).toString(), 'né 苹');
  assert.deepEqual(
    content[0].top_logprobs.map((entry: any) => entry.logprob),
    [-0.1, -9999],
  );
  assert.equal(body.choices[0].finish_reason, 'length');
  assert.equal(harness.engine.requests[0]!.sampling.numLogprobs, 2);
  await harness.close();
});

test('nothing answered: content is null', async () => {
  const harness = startHarness();
  harness.engine.script = oneByOne(harness.tokens('still thinking', 'reasoning'), 'length');
  const { body } = await harness.chat(QUESTION);
  checkWhole(body);
  assert.deepEqual(body.choices[0].message, {
    role: 'assistant',
    content: null,
    reasoning_content: 'still thinking',
    refusal: null,
  });
  harness.engine.script = oneByOne([{ id: 1, phase: 'control' }]);
  const empty = await harness.chat({ ...QUESTION, stream: true });
  const [chunk] = eventsOf(empty.text);
  checkChunk(chunk);
  assert.deepEqual(chunk.choices[0].delta, { role: 'assistant', content: '' });
  await harness.close();
});

test('tool calls, whole and streamed', async () => {
  const harness = startHarness();
  const call = (name: string, args: string): EmittedToken[] => [
    { id: 9, phase: 'tool' },
    ...harness.tokens(name, 'tool'),
    { id: 11, phase: 'tool' },
    ...harness.tokens(args, 'tool'),
    { id: 10, phase: 'tool' },
  ];
  harness.engine.script = oneByOne([
    { id: 7, phase: 'control' },
    ...call('search', '{"query": "violin"}'),
    ...call('add', '{"a": 1}'),
    { id: 8, phase: 'control' },
    { id: 1, phase: 'control' },
  ]);
  const tools = [{ type: 'function', function: { name: 'search', parameters: { type: 'object' } } }];
  const { body } = await harness.chat({ ...QUESTION, tools });
  checkWhole(body);
  const [choice] = body.choices;
  assert.equal(choice.finish_reason, 'tool_calls');
  assert.equal(choice.message.content, null);
  assert.deepEqual(
    choice.message.tool_calls.map((c: any) => [c.type, c.function.name, c.function.arguments]),
    [
      ['function', 'search', '{"query": "violin"}'],
      ['function', 'add', '{"a": 1}'],
    ],
  );
  const chunks = eventsOf((await harness.chat({ ...QUESTION, tools, stream: true })).text).slice(0, -1);
  chunks.forEach(checkChunk);
  const pieces = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  for (const index of [0, 1]) {
    const own = pieces.filter((piece: any) => piece.index === index);
    assert.equal(own.filter((piece: any) => piece.id !== undefined).length, 1);
    assert.equal(
      own.map((piece: any) => piece.function.arguments).join(''),
      ['{"query": "violin"}', '{"a": 1}'][index],
    );
  }
  assert.equal(chunks.at(-1).choices[0].finish_reason, 'tool_calls');
  await harness.close();
});

test('--reasoning-field names the field', async () => {
  for (const [field, expected] of [
    ['reasoning', { reasoning: 'Let me see.' }],
    ['both', { reasoning: 'Let me see.', reasoning_content: 'Let me see.' }],
  ] as const) {
    const { chat, close } = startHarness({ args: ['--reasoning-field', field] });
    const { body } = await chat(QUESTION);
    checkWhole(body);
    assert.deepEqual(body.choices[0].message, { role: 'assistant', content: 'It is 4.', ...expected, refusal: null });
    await close();
  }
});

test('seeds of 64 bits come back as they were given', async () => {
  const { chat, engine, close } = startHarness();
  for (const seed of ['9223372036854775807', '-9223372036854775808', '-1', '0', '9007199254740993']) {
    const { text } = await chat(`${JSON.stringify(QUESTION).slice(0, -1)}, "seed": ${seed}}`);
    assert.match(text, new RegExp(`"seed":${seed}\\}$`));
    assert.equal(BigInt.asIntN(64, engine.requests.at(-1)!.sampling.seed), BigInt(seed));
  }
  await close();
});

test('errors of the engine: a status before the first token, an event after it', async () => {
  const harness = startHarness();
  const failure = { finishReason: 'error', error: { code: 'engine_failed', message: 'The engine died.' } } as const;
  harness.engine.script = () => [failure];
  for (const stream of [false, true]) {
    const { status, body } = await harness.chat({ ...QUESTION, stream });
    assert.equal(status, 500);
    checkError(body);
    assert.deepEqual(body.error, {
      message: 'The engine died.',
      type: 'server_error',
      param: null,
      code: 'engine_failed',
    });
  }
  harness.engine.script = () => [{ tokens: harness.tokens('half', 'answer') }, failure];
  assert.equal((await harness.chat(QUESTION)).status, 500);
  const events = eventsOf((await harness.chat({ ...QUESTION, stream: true })).text);
  checkError(events.at(-1));
  assert.equal(events.at(-1).error.code, 'engine_failed');
  assert.equal(events[0].choices[0].delta.content, 'half');
  await harness.close();
});

test('models, health, metrics, the document and the page', async () => {
  const { app, engine, close } = startHarness({
    args: ['--served-model-name', 'org/name', '--served-model-name', 'other'],
  });
  const get = async (url: string): Promise<{ status: number; text: string }> => {
    const { statusCode, body } = await app.inject({ url });
    return { status: statusCode, text: body };
  };
  const list = JSON.parse((await get('/v1/models')).text);
  check('ModelList', 'ListModelsResponse', list);
  assert.deepEqual(
    list.data.map((model: any) => model.id),
    ['org/name', 'other'],
  );
  for (const url of ['/v1/models/org/name', '/v1/models/org%2Fname']) {
    const model = JSON.parse((await get(url)).text);
    check('Model', 'Model', model);
    assert.equal(model.id, 'org/name');
  }
  assert.equal((await get('/v1/models/none')).status, 404);
  const health = async (url: string): Promise<any> => {
    const { status, text } = await get(url);
    const body = JSON.parse(text);
    const validate = ours(url.includes('live') ? 'Liveness' : 'Health');
    assert.ok(validate(body), JSON.stringify(validate.errors));
    return { code: status, ...(body as object) };
  };
  assert.deepEqual(await health('/health/live'), { code: 200, status: 'live' });
  assert.deepEqual(await health('/health?live'), { code: 200, status: 'live' });
  assert.equal((await health('/health')).status, 'ready');
  engine.engineState = { status: 'restarting', reason: 'it was killed', loadedBytes: 1, totalBytes: 2 };
  const restarting = await health('/health');
  assert.equal((await health('/health/live')).code, 200);
  assert.deepEqual([restarting.code, restarting.reason, restarting.total_bytes], [503, 'it was killed', 2]);
  engine.engineState = { status: 'failed', reason: 'no weights' };
  assert.deepEqual(await health('/health'), { code: 503, status: 'failed', model: 'org/name', reason: 'no weights' });
  assert.deepEqual(await health('/health/live'), { code: 503, status: 'failed', reason: 'no weights' });

  const { text: metrics } = await get('/metrics');
  assert.match(metrics, /^rodin:blocks\{state="referenced",model_name="org\/name",engine="0"\} 2$/m);
  assert.match(metrics, /^vllm:kv_cache_usage_perc\{.*\} 0\.2$/m);
  assert.match(metrics, /^vllm:prefix_cache_hits_total\{.*\} 4$/m);
  assert.match(metrics, /^vllm:cache_config_info\{block_size="64",num_gpu_blocks="10",.*\} 1$/m);
  const document = JSON.parse((await get('/openapi.json')).text);
  assert.equal(document.paths['/v1/chat/completions'].post.operationId, 'createChatCompletion');
  assert.match((await get('/')).text, /curl http:\/\/[^ ]+\/v1\/chat\/completions/);
  await close();
});

test('metrics count completions by how they ended', async () => {
  const harness = startHarness();
  await harness.chat(QUESTION);
  harness.engine.script = () => [{ finishReason: 'error', error: { code: 'engine_failed', message: 'x' } }];
  await harness.chat(QUESTION);
  const { body } = await harness.app.inject({ url: '/metrics' });
  const value = (line: string): string | undefined => new RegExp(`^${line}(?:,[^}]*)?\\} (.*)$`, 'm').exec(body)?.[1];
  assert.equal(value('rodin:completions_total\\{finish_reason="stop"'), '1');
  assert.equal(value('rodin:completions_total\\{finish_reason="error"'), '1');
  assert.equal(value('vllm:request_success_total\\{finished_reason="stop"'), '1');
  assert.equal(value('rodin:http_responses_total\\{operation="createChatCompletion",status="500"'), '1');
  assert.match(body, /^vllm:time_to_first_token_seconds_count\{.*\} 1$/m);
  assert.match(body, /^rodin:time_to_first_answer_token_seconds_count\{.*\} 1$/m);
  await harness.close();
});
