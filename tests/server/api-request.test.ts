import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ApiError } from '../../server/errors.js';
import { Contract } from '../../server/api/contract.js';
import { QUESTION, startHarness } from '../contract/harness.js';

test('sampling: request over generation_config.json over neutral', async () => {
  const { chat, engine, close } = startHarness();
  const sampling = async (body: object): Promise<any> => {
    const { status, text } = await chat({ ...QUESTION, ...body });
    assert.equal(status, 200, text);
    return engine.requests.at(-1)!.sampling;
  };
  const { seed, maxTokens, ...rest } = await sampling({});
  assert.deepEqual(rest, {
    temperature: 0.6,
    topP: 0.95,
    topK: 0,
    minP: 0,
    presencePenalty: 0,
    frequencyPenalty: 0,
    repetitionPenalty: 1,
    logitBias: [],
    stopTokenIds: [1],
    minTokens: 0,
    numLogprobs: -1,
  });
  assert.equal(maxTokens, 4096 - engine.requests[0]!.promptIds.length);
  assert.notEqual(seed, (await sampling({})).seed);
  const all = await sampling({
    temperature: 0,
    top_p: 0.5,
    top_k: 7,
    min_p: 0.25,
    presence_penalty: 1,
    frequency_penalty: -1,
    repetition_penalty: 1.5,
    logit_bias: { 5: -100, 1023: 3.5 },
    stop_token_ids: [7, 7, 1],
    min_tokens: 3,
    max_completion_tokens: 9,
    seed: 42,
    logprobs: true,
  });
  assert.deepEqual(all, {
    temperature: 0,
    topP: 0.5,
    topK: 7,
    minP: 0.25,
    presencePenalty: 1,
    frequencyPenalty: -1,
    repetitionPenalty: 1.5,
    logitBias: [
      [5, -100],
      [1023, 3.5],
    ],
    stopTokenIds: [7, 1],
    minTokens: 3,
    maxTokens: 9,
    seed: 42n,
    numLogprobs: 0,
  });
  assert.equal((await sampling({ top_k: -1 })).topK, 0);
  assert.deepEqual((await sampling({ ignore_eos: true })).stopTokenIds, []);
  assert.deepEqual((await sampling({ ignore_eos: true, stop_token_ids: [1] })).stopTokenIds, [1]);
  assert.equal((await sampling({ logprobs: true, top_logprobs: 20 })).numLogprobs, 20);
  assert.equal((await sampling({ seed: -1 })).seed, 2n ** 64n - 1n);
  await close();
});

test('thinking is on by default and has four spellings of off', async () => {
  const { chat, engine, close } = startHarness();
  const phase = async (body: object): Promise<string> => {
    await chat({ ...QUESTION, ...body });
    return engine.requests.at(-1)!.startPhase;
  };
  assert.equal(await phase({}), 'reasoning');
  assert.equal(await phase({ thinking: { type: 'enabled' } }), 'reasoning');
  for (const off of [
    { thinking: { type: 'disabled' } },
    { chat_template_kwargs: { thinking: false } },
    { chat_template_kwargs: { enable_thinking: false } },
    { chat_template_kwargs: { thinking: false, enable_thinking: false }, thinking: { type: 'disabled' } },
  ]) {
    assert.equal(await phase(off), 'answer', JSON.stringify(off));
  }
  assert.deepEqual(engine.requests[0]!.markers, { thinkStart: 5, thinkEnd: 6, toolCallsBegin: 7, toolCallsEnd: 8 });
  await close();
});

test('conversations: roles, parts, reasoning under both names, tool results', async () => {
  const { chat, engine, prompts, close } = startHarness();
  const idsOf = async (messages: unknown[], extra: object = {}): Promise<number[]> => {
    const { status, text } = await chat({ ...QUESTION, messages, ...extra });
    assert.equal(status, 200, text);
    return engine.requests.at(-1)!.promptIds;
  };
  const direct = async (messages: any[], tools: unknown[] | null = null): Promise<number[]> =>
    (await prompts.encode({ messages, tools })).ids;
  const user = { role: 'user', content: 'hi' };
  assert.deepEqual(
    await idsOf([
      {
        role: 'developer',
        content: [
          { type: 'text', text: 'a' },
          { type: 'text', text: 'b' },
        ],
      },
      user,
    ]),
    await direct([{ role: 'system', content: 'a\nb' }, user]),
  );
  const call = { id: 'c1', type: 'function', function: { name: 'search', arguments: '{"q": 1}' } };
  const result = { role: 'tool', content: 'found', tool_call_id: 'c1' };
  const expected = await direct([
    user,
    { role: 'assistant', content: null, reasoning_content: 'so', tool_calls: [call] },
    result,
  ]);
  for (const name of ['reasoning', 'reasoning_content']) {
    assert.deepEqual(await idsOf([user, { role: 'assistant', [name]: 'so', tool_calls: [call] }, result]), expected);
  }
  // What an answer cut short in its reasoning looks like when it is sent back.
  assert.deepEqual(
    await idsOf([user, { role: 'assistant', content: null, refusal: null }, user]),
    await direct([user, { role: 'assistant', content: '' }, user]),
  );
  const tools = [{ type: 'function', function: { name: 'f', parameters: { type: 'object' } } }];
  assert.deepEqual(await idsOf([user], { tools }), await direct([user], tools));
  assert.deepEqual(await idsOf([user], { tools, tool_choice: 'none' }), await direct([user]));
  assert.deepEqual(engine.requests.at(-1)!.sampling.logitBias, [[7, -Infinity]]);
  assert.deepEqual(await idsOf([user], { tools: [] }), await direct([user]));
  await close();
});

test('ids come back where asked for, prompt and completion', async () => {
  const { chat, engine, thought, close } = startHarness();
  const { body } = await chat({ ...QUESTION, return_token_ids: true });
  assert.deepEqual(body.prompt_token_ids, engine.requests[0]!.promptIds);
  assert.deepEqual(
    body.choices[0].token_ids,
    thought('Let me see.', 'It is 4.').map((token) => token.id),
  );
  assert.ok(!('token_ids' in (await chat(QUESTION)).body.choices[0]));
  await close();
});

test('--max-model-len shortens the context, and may not lengthen it', async () => {
  const { chat, engine, close } = startHarness({ args: ['--max-model-len', '100'] });
  assert.equal((await chat({ ...QUESTION, max_tokens: 99 })).body.error.code, 'context_length_exceeded');
  await chat(QUESTION);
  assert.equal(engine.requests[0]!.promptIds.length + engine.requests[0]!.sampling.maxTokens, 100);
  await close();
  assert.throws(() => startHarness({ args: ['--max-model-len', '5000'] }), /more than the 4096 positions/);
});

test('what the engine refuses keeps its status', async () => {
  const { chat, engine, close } = startHarness();
  for (const [code, status] of [
    ['queue_full', 429],
    ['model_loading', 503],
    ['engine_restarting', 503],
  ] as const) {
    engine.submitError = new ApiError(code, 'Not now.');
    for (const stream of [true, false]) {
      const response = await chat({ ...QUESTION, stream });
      assert.deepEqual(
        [response.status, response.body.error.code, response.headers['retry-after']],
        [status, code, '1'],
      );
    }
  }
  engine.submitError = new Error('secret detail');
  const broken = await chat(QUESTION);
  assert.deepEqual([broken.status, broken.body.error.code], [500, 'internal_error']);
  assert.doesNotMatch(broken.text, /secret/);
  await close();
});

const KEYS = ['--api-key', 'alpha', '--api-key', 'beta'];

test('with keys every operation but health asks for one', async () => {
  const { app, close } = startHarness({ args: KEYS });
  const requests = Contract.read().operations.map(({ method, url, isPublic }) => ({ method, url, isPublic }));
  requests.push(
    { method: 'GET', url: '/nowhere', isPublic: false },
    { method: 'GET', url: '/v1/models/a/b', isPublic: false },
  );
  for (const { method, url, isPublic } of requests) {
    assert.equal(isPublic, url.startsWith('/health'), url);
    const { statusCode, body, headers } = await app.inject({ method, url });
    assert.equal(statusCode, isPublic ? 200 : 401, `${method} ${url}`);
    if (isPublic) continue;
    const { error } = JSON.parse(body);
    if (url.startsWith('/v1/messages')) assert.equal(error.type, 'authentication_error');
    else assert.equal(error.code, 'invalid_api_key');
    assert.equal(headers['www-authenticate'], 'Bearer');
  }
  for (const authorization of [
    'Bearer',
    'Bearer ',
    'Bearer gamma',
    'Basic alpha',
    'alpha',
    'Bearer alpha beta',
    'Bearer alph',
    'Bearer alphaa',
    '',
    'bearer\talpha',
    `Bearer ${'x'.repeat(8000)}`,
    'Bearer undefined',
    'Bearer null',
  ]) {
    assert.equal((await app.inject({ url: '/v1/models', headers: { authorization } })).statusCode, 401, authorization);
  }
  for (const authorization of ['Bearer alpha', 'Bearer beta', 'bearer alpha', 'Bearer  beta ']) {
    assert.equal((await app.inject({ url: '/v1/models', headers: { authorization } })).statusCode, 200, authorization);
  }
  for (const url of [
    '/health/../v1/models',
    '//v1/models',
    '/v1//models',
    '/health/live/../../metrics',
    '/HEALTH/../metrics',
  ]) {
    assert.notEqual((await app.inject({ url })).statusCode, 200, url);
  }
  await close();
});

test('cached prefixes are shared within a key and a salt alone', async () => {
  const { chat, engine, close } = startHarness({ args: KEYS });
  const salt = async (key: string, body: object = {}): Promise<string> => {
    await chat({ ...QUESTION, ...body }, { authorization: `Bearer ${key}` });
    return engine.requests.at(-1)!.cacheSalt;
  };
  const salts = [
    await salt('alpha'),
    await salt('beta'),
    await salt('alpha', { cache_salt: 'a' }),
    await salt('beta', { cache_salt: 'a' }),
  ];
  assert.equal(new Set(salts).size, 4);
  assert.equal(await salt('alpha'), salts[0]);
  assert.ok(salts.every((text) => !text.includes('alpha')));
  await close();
  const open = startHarness();
  await open.chat(QUESTION);
  assert.equal(open.engine.requests[0]!.cacheSalt, '');
  await open.close();
});

test('pages of other origins are let in by --cors-origin alone', async () => {
  const origin = 'https://chat.example';
  const preflight = {
    method: 'OPTIONS',
    url: '/v1/chat/completions',
    headers: { origin, 'access-control-request-method': 'POST' },
  } as const;
  const closed = startHarness();
  assert.equal((await closed.app.inject(preflight)).headers['access-control-allow-origin'], undefined);
  await closed.close();
  const { app, close } = startHarness({ args: ['--cors-origin', origin, ...KEYS] });
  const allowed = await app.inject(preflight);
  assert.deepEqual([allowed.statusCode, allowed.headers['access-control-allow-origin']], [204, origin]);
  const get = await app.inject({ url: '/health', headers: { origin } });
  assert.equal(get.headers['access-control-allow-origin'], origin);
  const other = await app.inject({ ...preflight, headers: { ...preflight.headers, origin: 'https://evil.example' } });
  assert.equal(other.headers['access-control-allow-origin'], undefined);
  assert.equal(other.statusCode, 401);
  await close();
});
