import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { ApiError } from '../../server/errors.js';
import { Drain } from '../../server/api/drain.js';
import type { EmittedToken } from '../../server/engine/request.js';
import { oneByOne } from './fake-engine.js';
import { DOCUMENT, startHarness, validatorsOf, type Harness } from './harness.js';

const validators = validatorsOf(DOCUMENT);

/** Asserts that a body is what the document says. */
function checkOf(schema: string): (body: any, shown?: string) => void {
  const validate = validators(schema);
  return (body, shown = '') =>
    assert.ok(validate(body), `${shown} ${JSON.stringify(body)}: ${JSON.stringify(validate.errors)}`);
}

const isMessage = checkOf('Message');
const isEvent = checkOf('MessagesEvent');
const isError = checkOf('MessagesError');
const isCount = checkOf('MessagesCount');

const ASK = { model: 'pocket-r1', max_tokens: 100, messages: [{ role: 'user', content: 'What is 2 + 2?' }] };
const TOOLS = [{ name: 'search', description: 'Search the web.', input_schema: { type: 'object' } }];

async function post(
  { app }: Harness,
  body: unknown,
  { headers = {}, path = '' }: { headers?: Record<string, string>; path?: string } = {},
): Promise<{ status: number; text: string; body: any; headers: any }> {
  const response = await app.inject({
    method: 'POST',
    url: `/v1/messages${path}`,
    headers: { 'content-type': 'application/json', 'anthropic-version': '2023-06-01', ...headers },
    payload: typeof body === 'string' ? body : JSON.stringify(body),
  });
  const { statusCode: status, body: text } = response;
  const isJson = String(response.headers['content-type']).startsWith('application/json');
  assert.match(String(response.headers['request-id']), /^req_[0-9a-f]{32}$/);
  return { status, text, body: isJson ? JSON.parse(text) : null, headers: response.headers };
}

async function whole(harness: Harness, body: unknown): Promise<any> {
  const { status, body: message, text } = await post(harness, body);
  assert.equal(status, 200, text);
  isMessage(message);
  return message;
}

/** Events of a stream, each checked against the document, with its name equal to its type. */
function eventsOf(text: string): any[] {
  return text
    .split('\n\n')
    .filter(Boolean)
    .map((part) => {
      const [, name, data = ''] = /^event: (\w+)\ndata: (.*)$/.exec(part)!;
      const event = JSON.parse(data);
      assert.equal(event.type, name);
      isEvent(event);
      return event;
    });
}

async function streamed(harness: Harness, body: object): Promise<any[]> {
  const { status, text } = await post(harness, { ...body, stream: true });
  assert.equal(status, 200, text);
  return eventsOf(text);
}

/** The types of events and deltas, repeats left out. */
function shapeOf(events: readonly any[]): string[] {
  const names = events.map(({ type, delta }) => (type === 'content_block_delta' ? delta.type : type));
  return names.filter((name, index) => name !== names[index - 1] || !name.endsWith('_delta'));
}

/** What a client makes of a stream. */
function messageOf(events: readonly any[]): any {
  const message = structuredClone(events[0].message);
  const args: string[] = [];
  for (const { type, index, content_block: block, delta, usage } of events) {
    if (type === 'content_block_start') {
      assert.equal(index, message.content.length);
      message.content.push(structuredClone(block));
      args.push('');
    }
    if (type === 'content_block_delta') {
      assert.equal(index, message.content.length - 1);
      if (delta.type === 'text_delta') message.content[index].text += delta.text;
      if (delta.type === 'thinking_delta') message.content[index].thinking += delta.thinking;
      if (delta.type === 'input_json_delta') args[index] += delta.partial_json;
    }
    if (type === 'content_block_stop' && args[index]) message.content[index].input = JSON.parse(args[index]);
    if (type === 'message_delta') Object.assign(message, delta, { usage });
  }
  return message;
}

const anonymous = (message: any): any => ({
  ...message,
  id: '',
  content: message.content.map((block: any) => ('id' in block ? { ...block, id: '' } : block)),
});

function callTokens(harness: Harness, calls: [name: string, args: string][]): EmittedToken[] {
  return [
    { id: 7, phase: 'control' },
    ...calls.flatMap(([name, args]): EmittedToken[] => [
      { id: 9, phase: 'tool' },
      ...harness.tokens(name, 'tool'),
      { id: 11, phase: 'tool' },
      ...harness.tokens(args, 'tool'),
      { id: 10, phase: 'tool' },
    ]),
    { id: 8, phase: 'control' },
    { id: 1, phase: 'control' },
  ];
}

test('a whole message: thinking, text, usage', async () => {
  const harness = startHarness();
  const message = await whole(harness, ASK);
  const numPrompt = harness.engine.requests[0]!.promptIds.length;
  assert.match(message.id, /^msg_[0-9a-f]{32}$/);
  assert.deepEqual(message.content, [
    { type: 'thinking', thinking: 'Let me see.', signature: '' },
    { type: 'text', text: 'It is 4.' },
  ]);
  assert.deepEqual([message.stop_reason, message.stop_sequence], ['end_turn', null]);
  const { usage } = message;
  assert.deepEqual([usage.input_tokens, usage.cache_read_input_tokens], [numPrompt - 2, 2]);
  assert.equal(usage.cache_creation_input_tokens, 0);
  const numThinking = usage.output_tokens_details.thinking_tokens;
  assert.ok(numThinking > 0 && numThinking < usage.output_tokens);
  assert.equal(harness.engine.requests[0]!.sampling.maxTokens, 100);
  await harness.close();
});

test('the stream of the same, in exactly this order', async () => {
  const harness = startHarness();
  const events = await streamed(harness, ASK);
  assert.deepEqual(shapeOf(events), [
    'message_start',
    'content_block_start',
    'thinking_delta',
    'signature_delta',
    'content_block_stop',
    'content_block_start',
    'text_delta',
    'content_block_stop',
    'message_delta',
    'message_stop',
  ]);
  assert.deepEqual(events[1].content_block, { type: 'thinking', thinking: '', signature: '' });
  const numPrompt = harness.engine.requests[0]!.promptIds.length;
  assert.deepEqual(
    [events[0].message.usage.input_tokens, events[0].message.usage.cache_read_input_tokens],
    [numPrompt - 2, 2],
  );
  assert.deepEqual(anonymous(messageOf(events)), anonymous(await whole(harness, ASK)));
  await harness.close();
});

test('tool calls: text before them, one block each, inputs as objects; whole equals stream for every split', async () => {
  const harness = startHarness();
  const tokens = [
    ...harness.tokens('I search. ', 'reasoning'),
    { id: 6, phase: 'control' } as const,
    ...harness.tokens('Let me look 苹果 😀.', 'answer'),
    ...callTokens(harness, [
      ['search', '{"query": "violin", "n": [1, {"é": null}]}'],
      ['now', '{}'],
      ['search', ''],
    ]),
  ];
  const request = { ...ASK, tools: TOOLS };
  harness.engine.script = oneByOne(tokens);
  const message = await whole(harness, request);
  assert.deepEqual(
    message.content.map(({ type, name, input }: any) => [type, name, input]),
    [
      ['thinking', undefined, undefined],
      ['text', undefined, undefined],
      ['tool_use', 'search', { query: 'violin', n: [1, { é: null }] }],
      ['tool_use', 'now', {}],
      ['tool_use', 'search', {}],
    ],
  );
  assert.equal(message.stop_reason, 'tool_use');
  const ids = message.content.slice(2).map(({ id }: any) => id);
  assert.equal(new Set(ids).size, 3);
  for (const id of ids) assert.match(id, /^toolu_[0-9a-f]{24}$/);
  const one = { ...request, tool_choice: { type: 'auto', disable_parallel_tool_use: true } };
  assert.deepEqual(anonymous(await whole(harness, one)).content, anonymous(message).content.slice(0, 3));
  for (let size = 1; size <= tokens.length; size++) {
    harness.engine.script = function* () {
      for (let i = 0; i < tokens.length; i += size) {
        const isLast = i + size >= tokens.length;
        yield { tokens: tokens.slice(i, i + size), cachedTokens: 2, ...(isLast ? { finishReason: 'stop' } : {}) };
      }
    };
    const events = await streamed(harness, request);
    assert.deepEqual(anonymous(messageOf(events)), anonymous(message), `${size} tokens an event`);
  }
  await harness.close();
});

test('arguments that are no JSON object are shown as they are', async () => {
  const harness = startHarness();
  for (const args of ['{"query": "vio', '[1]', 'null', '{query: 1}']) {
    harness.engine.script = oneByOne(callTokens(harness, [['search', args]]));
    const message = await whole(harness, { ...ASK, tools: TOOLS });
    assert.deepEqual(message.content[0].input, { INVALID_JSON: args });
    const events = await streamed(harness, { ...ASK, tools: TOOLS });
    const deltas = events.filter(({ delta }) => delta?.type === 'input_json_delta');
    assert.equal(deltas.map(({ delta }) => delta.partial_json).join(''), args);
  }
  await harness.close();
});

test('why it stopped', async () => {
  const harness = startHarness();
  const reasonsOf = async (body: object): Promise<unknown[]> => {
    const message = await whole(harness, body);
    const delta = (await streamed(harness, body)).find(({ type }) => type === 'message_delta').delta;
    assert.deepEqual(delta, { stop_reason: message.stop_reason, stop_sequence: message.stop_sequence });
    return [message.stop_reason, message.stop_sequence, message.content.at(-1)?.text ?? null];
  };
  // The word is in the reasoning too, which is not searched.
  harness.engine.script = oneByOne(harness.thought('The END?', 'It is END of it'));
  assert.deepEqual(await reasonsOf({ ...ASK, stop_sequences: ['nothing', 'END'] }), ['stop_sequence', 'END', 'It is ']);
  assert.deepEqual(await reasonsOf(ASK), ['end_turn', null, 'It is END of it']);
  harness.engine.script = oneByOne(harness.tokens('It is', 'answer'), 'length');
  assert.deepEqual(await reasonsOf(ASK), ['max_tokens', null, 'It is']);
  assert.deepEqual(await reasonsOf({ ...ASK, max_tokens: 32_000 }), ['model_context_window_exceeded', null, 'It is']);
  const { promptIds, sampling } = harness.engine.requests.at(-1)!;
  assert.equal(promptIds.length + sampling.maxTokens, 4096);
  harness.engine.script = oneByOne([{ id: 1, phase: 'control' }]);
  assert.deepEqual(await reasonsOf(ASK), ['end_turn', null, null]);
  await harness.close();
});

test('a conversation of blocks is rendered as the same chat is', async () => {
  const harness = startHarness();
  const { engine } = harness;
  await post(harness, {
    ...ASK,
    system: [{ type: 'text', text: 'Be brief.', cache_control: { type: 'ephemeral' } }],
    tools: TOOLS,
    messages: [
      { role: 'user', content: [{ type: 'text', text: 'Search for' }] },
      { role: 'user', content: 'two things.' },
      {
        role: 'assistant',
        content: [
          { type: 'thinking', thinking: 'Both at once.', signature: 'x' },
          { type: 'redacted_thinking', data: 'x' },
          { type: 'text', text: 'Let me look.' },
          { type: 'tool_use', id: 'toolu_1', name: 'search', input: { query: 'a, "b"\n', deep: [1, { c: {} }] } },
          { type: 'tool_use', id: 'toolu_2', name: 'search', input: {} },
        ],
      },
      {
        role: 'user',
        content: [
          { type: 'tool_result', tool_use_id: 'toolu_2', content: 'not there', is_error: true },
          {
            type: 'tool_result',
            tool_use_id: 'toolu_1',
            content: [
              { type: 'text', text: 'one' },
              { type: 'text', text: 'two' },
            ],
          },
          { type: 'text', text: 'Go on.' },
        ],
      },
    ],
  });
  const call = (id: string, args: string) => ({ id, type: 'function', function: { name: 'search', arguments: args } });
  const { name, description, input_schema: parameters } = TOOLS[0]!;
  await harness.chat({
    model: 'pocket-r1',
    tools: [{ type: 'function', function: { name, description, parameters } }],
    messages: [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'Search for\ntwo things.' },
      {
        role: 'assistant',
        content: 'Let me look.',
        reasoning_content: 'Both at once.',
        tool_calls: [call('toolu_1', '{"query": "a, \\"b\\"\\n", "deep": [1, {"c": {}}]}'), call('toolu_2', '{}')],
      },
      { role: 'tool', tool_call_id: 'toolu_1', content: 'one\ntwo' },
      { role: 'tool', tool_call_id: 'toolu_2', content: 'Error: not there' },
      { role: 'user', content: 'Go on.' },
    ],
  });
  const [ours, chat] = engine.requests;
  const text = (ids: number[]): string => ids.map((id) => harness.prompts.tokenizer.bytesOf(id).toString()).join(' ');
  assert.equal(engine.requests.length, 2);
  assert.deepEqual(ours!.promptIds, chat!.promptIds, `${text(ours!.promptIds)}\n${text(chat!.promptIds)}`);
  await harness.close();
});

test('thinking on, off and as the model likes; its text left out', async () => {
  const harness = startHarness();
  const startOf = async (thinking: unknown): Promise<string> => {
    await whole(harness, { ...ASK, thinking });
    return harness.engine.requests.at(-1)!.startPhase;
  };
  assert.equal(await startOf(null), 'reasoning');
  assert.equal(await startOf({ type: 'adaptive' }), 'reasoning');
  assert.equal(await startOf({ type: 'disabled' }), 'answer');
  const hidden = { ...ASK, thinking: { type: 'adaptive', display: 'omitted' } };
  const { content } = await whole(harness, hidden);
  assert.deepEqual(content[0], { type: 'thinking', thinking: '', signature: '' });
  assert.deepEqual(shapeOf(await streamed(harness, hidden)).slice(1, 4), [
    'content_block_start',
    'signature_delta',
    'content_block_stop',
  ]);
  await harness.close();
});

test('parameters reach the engine', async () => {
  const harness = startHarness();
  const extra = { temperature: 0.5, top_p: 0.9, top_k: 7, metadata: { user_id: 'me' }, service_tier: 'auto' };
  await whole(harness, { ...ASK, ...extra, tools: TOOLS, tool_choice: { type: 'none' } });
  const { sampling, promptIds } = harness.engine.requests[0]!;
  assert.deepEqual([sampling.temperature, sampling.topP, sampling.topK], [0.5, 0.9, 7]);
  assert.deepEqual(sampling.logitBias, [[7, -Infinity]]);
  await whole(harness, { ...ASK, system: [], tools: null, tool_choice: null, stop_sequences: null, top_k: null });
  assert.deepEqual(harness.engine.requests[1]!.promptIds, promptIds);
  await harness.close();
});

test('thinking stays a block where the server puts reasoning of chats into the content', async () => {
  const harness = startHarness({ args: ['--reasoning-format', 'none'] });
  const { content } = await whole(harness, ASK);
  assert.deepEqual(content[0], { type: 'thinking', thinking: 'Let me see.', signature: '' });
  await harness.close();
});

test('budget_tokens limits the reasoning', async () => {
  const harness = startHarness();
  await whole(harness, { ...ASK, thinking: { type: 'enabled', budget_tokens: 50 } });
  assert.equal(harness.engine.requests[0]!.thinking?.budget, 50);
  await harness.close();
});

test('effort, formats, strict tools and forced calls reach the engine as those of a chat do', async () => {
  const harness = startHarness();
  const { engine } = harness;
  const schema = { type: 'object', properties: { n: { type: 'integer' } }, required: ['n'] };
  const tool = { name: 'search', input_schema: schema };
  const chatTool = (strict?: boolean) => ({
    type: 'function',
    function: { name: 'search', parameters: schema, ...(strict ? { strict } : {}) },
  });
  const format = { type: 'json_schema', schema };
  const chatFormat = { type: 'json_schema', json_schema: { name: 'x', schema } };
  const named = { type: 'function', function: { name: 'search' } };
  const pairs: [object, object][] = [
    [{ output_config: { effort: 'low' } }, { reasoning_effort: 'low' }],
    [{ output_config: { effort: 'xhigh' }, thinking: { type: 'adaptive' } }, { reasoning_effort: 'xhigh' }],
    [{ output_config: { effort: 'low' }, thinking: { type: 'disabled' } }, { thinking: { type: 'disabled' } }],
    [
      { output_config: { effort: 'low' }, thinking: { type: 'enabled', budget_tokens: 60 } },
      { thinking: { type: 'enabled', budget_tokens: 60 } },
    ],
    [{ output_config: { format } }, { response_format: chatFormat }],
    [{ output_format: format }, { response_format: chatFormat }],
    [
      { tools: [tool], tool_choice: { type: 'any' } },
      { tools: [chatTool()], tool_choice: 'required' },
    ],
    [
      { tools: [tool], tool_choice: { type: 'tool', name: 'search' } },
      { tools: [chatTool()], tool_choice: named },
    ],
    [{ tools: [{ ...tool, strict: true }] }, { tools: [chatTool(true)] }],
    [{ tools: [tool], tool_choice: { type: 'auto' } }, { tools: [chatTool()] }],
    [
      { messages: [...ASK.messages, { role: 'assistant', content: 'It is' }] },
      { messages: [...ASK.messages, { role: 'assistant', content: 'It is' }] },
    ],
  ];
  for (const [ours, chats] of pairs) {
    await whole(harness, { ...ASK, ...ours });
    await harness.chat({ ...ASK, ...chats });
    const [own, chat] = engine.requests.splice(0);
    for (const field of ['promptIds', 'startPhase', 'thinking', 'grammar'] as const) {
      assert.deepEqual(own![field], chat![field], `${field} of ${JSON.stringify(ours)}`);
    }
  }
  await harness.close();
});

test('models in the form of the Messages API, where its version is named', async () => {
  const harness = startHarness({ args: ['a', 'b', 'c'].flatMap((name) => ['--served-model-name', name]) });
  const get = async (path: string, headers: Record<string, string> = { 'anthropic-version': '2023-06-01' }) => {
    const { statusCode, body } = await harness.app.inject({ url: `/v1/models${path}`, headers });
    return { status: statusCode, body: JSON.parse(body) };
  };
  const pages: [string, string[], boolean][] = [
    ['', ['a', 'b', 'c'], false],
    ['?limit=2', ['a', 'b'], true],
    ['?limit=2&after_id=b', ['c'], false],
    ['?after_id=c', [], false],
    ['?before_id=c&limit=1', ['b'], true],
  ];
  for (const [query, ids, hasMore] of pages) {
    const { body } = await get(query);
    checkOf('ModelPage')(body, query);
    assert.deepEqual([body.data.map(({ id }: any) => id), body.has_more], [ids, hasMore], query);
    assert.deepEqual([body.first_id, body.last_id], [ids[0] ?? null, ids.at(-1) ?? null]);
  }
  checkOf('ModelInfo')((await get('/b')).body);
  for (const [path, status] of [
    ['?limit=0', 400],
    ['?limit=x', 400],
    ['?after_id=z', 404],
    ['?after_id=a&before_id=b', 400],
    ['/z', 404],
  ] as const) {
    // prettier-ignore
    const refused = await get(path);
    assert.equal(refused.status, status, path);
    isError(refused.body, path);
  }
  assert.equal((await get('', {})).body.object, 'list');
  await harness.close();
});

test('count_tokens counts what the prompt has, also beyond the context', async () => {
  const harness = startHarness();
  const body = { ...ASK, system: 'Be brief.', tools: TOOLS };
  const message = await whole(harness, body);
  const count = await post(
    harness,
    { ...body, thinking: { type: 'enabled', budget_tokens: 50 } },
    { path: '/count_tokens' },
  );
  isCount(count.body);
  const { input_tokens: computed, cache_read_input_tokens: cached } = message.usage;
  assert.deepEqual(count.body, { input_tokens: computed + cached });
  const long = { ...ASK, messages: [{ role: 'user', content: '1'.repeat(5000) }] };
  assert.equal((await post(harness, long, { path: '/count_tokens' })).body.input_tokens, 5004);
  const refused = await post(harness, long);
  assert.deepEqual([refused.status, refused.body.error.type], [400, 'invalid_request_error']);
  assert.equal(harness.engine.requests.length, 1);
  await harness.close();
  // What cannot be asked for cannot be counted either: this model's reasoning has no switch and no end to force.
  const tagged = startHarness({ args: ['--reasoning-format', 'r1-zero'] });
  for (const rest of [{ thinking: { type: 'disabled' } }, { output_config: { effort: 'low' } }]) {
    const { status, body: error } = await post(tagged, { ...ASK, ...rest }, { path: '/count_tokens' });
    assert.equal(status, 400, JSON.stringify(rest));
    isError(error);
  }
  await tagged.close();
});

const user = { role: 'user', content: 'x' };
const toolUse = { type: 'tool_use', id: 'a', name: 'f', input: {} };
const image = { type: 'image', source: { type: 'url', url: 'http://169.254.169.254/' } };
const ask = (...messages: unknown[]): object => ({ ...ASK, messages });
const nested = (depth: number): unknown => (depth === 0 ? {} : { a: nested(depth - 1) });

const FORMAT = { type: 'json_schema', schema: { type: 'object' } };

/** [what is sent, status, type, words of the message] */
const REFUSED: [body: unknown, status: number, type: string, words: RegExp][] = [
  ['{', 400, 'invalid_request_error', /not valid JSON/],
  [{ ...ASK, model: 'claude' }, 404, 'not_found_error', /use 'pocket-r1'/],
  [{ ...ASK, max_tokens: undefined }, 400, 'invalid_request_error', /'max_tokens' is missing/],
  [{ ...ASK, max_tokens: 0 }, 400, 'invalid_request_error', /'max_tokens' must be >= 1/],
  [ask(), 400, 'invalid_request_error', /'messages' must have at least 1/],
  [ask({ role: 'tool', content: 'x' }), 400, 'invalid_request_error', /must be one of user, assistant, system/],
  [
    ask({ role: 'user', content: [image] }),
    400,
    'invalid_request_error',
    /\[0\]\.type' must be one of text, tool_result/,
  ],
  [ask({ role: 'user', content: [{ ...image, type: 'document' }] }), 400, 'invalid_request_error', /"document"/],
  [ask({ role: 'user', content: [toolUse] }), 400, 'invalid_request_error', /"tool_use"/],
  [ask(user, { role: 'assistant', content: [toolUse] }), 400, 'invalid_request_error', /'a' has no tool_result/],
  [
    {
      ...ask(user, { role: 'assistant', content: [{ type: 'thinking', thinking: 'I', signature: '' }] }),
      thinking: { type: 'disabled' },
    },
    400,
    'invalid_request_error',
    /'messages\[1\]\.content' cannot be gone on with/,
  ],
  [
    ask(
      user,
      { role: 'assistant', content: [toolUse] },
      { role: 'user', content: [{ type: 'tool_result', tool_use_id: 'a', content: [image] }] },
    ),
    400,
    'invalid_request_error',
    /'messages\[2\]\.content\[0\]\.content\[0\]\.type' must be/,
  ],
  [
    ask({ role: 'user', content: [{ type: 'tool_result', tool_use_id: 'a' }] }),
    400,
    'invalid_request_error',
    /'messages\[0\]\.content\[0\]\.tool_use_id' is no tool_use/,
  ],
  [ask(user, { role: 'assistant', content: [toolUse] }, user), 400, 'invalid_request_error', /'a' has no tool_result/],
  [ask(user, { role: 'assistant', content: [toolUse, toolUse] }, user), 400, 'invalid_request_error', /another call/],
  [
    ask(user, { role: 'assistant', content: [{ ...toolUse, input: nested(70) }] }, user),
    400,
    'invalid_request_error',
    /deeper than 64/,
  ],
  [{ ...ASK, temperature: 3 }, 400, 'invalid_request_error', /'temperature' must be <= 2/],
  [{ ...ASK, stop_sequences: ['\ud83d'] }, 400, 'invalid_request_error', /'stop_sequences\[0\]'/],
  [{ ...ASK, stop: 'x' }, 400, 'invalid_request_error', /use 'stop_sequences'/],
  [{ ...ASK, seed: 3 }, 400, 'invalid_request_error', /'seed' is not supported/],
  [{ ...ASK, thinking: { type: 'enabled' } }, 400, 'invalid_request_error', /budget_tokens' is missing/],
  [{ ...ASK, thinking: { type: 'enabled', budget_tokens: 100 } }, 400, 'invalid_request_error', /less than max_tokens/],
  [{ ...ASK, thinking: { type: 'adaptive', budget_tokens: 50 } }, 400, 'invalid_request_error', /only allowed with/],
  [{ ...ASK, tool_choice: { type: 'any' } }, 400, 'invalid_request_error', /there are no 'tools'/],
  [
    { ...ASK, tools: TOOLS, tool_choice: { type: 'tool' } },
    400,
    'invalid_request_error',
    /tool_choice.name' is missing/,
  ],
  [
    { ...ASK, tools: TOOLS, tool_choice: { type: 'tool', name: 'find' } },
    400,
    'invalid_request_error',
    /"find" is none of them/,
  ],
  [
    { ...ASK, tools: [{ type: 'web_search_20250305', name: 'web_search' }] },
    400,
    'invalid_request_error',
    /'tools\[0\]\.type'/,
  ],
  [
    { ...ASK, tools: [{ ...TOOLS[0], strict: true, input_schema: { not: {} } }] },
    400,
    'invalid_request_error',
    /'tools\[0\]\.input_schema' cannot be used: at '\/not'/,
  ],
  [{ ...ASK, tools: [{ name: 'f' }] }, 400, 'invalid_request_error', /'tools\[0\]\.input_schema' is missing/],
  [
    { ...ASK, output_config: { format: { type: 'json_schema' } } },
    400,
    'invalid_request_error',
    /output_config.format.schema' is missing/,
  ],
  [
    { ...ASK, output_config: { format: { type: 'json_schema', schema: { type: 'strnig' } } } },
    400,
    'invalid_request_error',
    /'output_config.format.schema' cannot be used: at '\/type'/,
  ],
  [
    { ...ASK, output_format: FORMAT, output_config: { format: FORMAT } },
    400,
    'invalid_request_error',
    /give one of them/,
  ],
  [{ ...ASK, output_config: { effort: 'most' } }, 400, 'invalid_request_error', /output_config.effort' must be one of/],
  [{ ...ASK, context_management: { edits: [{ type: 'x' }] } }, 400, 'invalid_request_error', /context_management/],
  [ask({ role: 'user', content: 'x'.repeat(8 << 20) }), 413, 'request_too_large', /--max-body-size/],
];

test('bad input: status, type and a sentence; the engine sees none of it', async () => {
  const harness = startHarness();
  for (const [body, status, type, words] of REFUSED) {
    const response = await post(harness, body);
    const shown = JSON.stringify(body).slice(0, 200);
    isError(response.body, shown);
    assert.deepEqual([response.status, response.body.error.type], [status, type], `${shown}\n${response.text}`);
    assert.match(response.body.error.message, words, shown);
    assert.equal(response.body.request_id, response.headers['request-id']);
  }
  const accepted = {
    output_config: { effort: 'high' },
    context_management: { edits: [{ type: 'clear_thinking_20251015', keep: 'all' }] },
    tools: [{ ...TOOLS[0], type: 'custom', strict: false, eager_input_streaming: true }],
    something_new: 1,
  };
  assert.equal(harness.engine.requests.length, 0);
  await whole(harness, { ...ASK, ...accepted });
  await harness.close();
});

test('keys in either header; paths and methods in the same shape', async () => {
  const harness = startHarness({ args: ['--api-key', 'one', '--api-key', 'two'] });
  const status = async (headers: Record<string, string>): Promise<unknown[]> => {
    const response = await post(harness, ASK, { headers });
    return [response.status, response.body.error?.type];
  };
  const refused = [401, 'authentication_error'];
  assert.deepEqual(await status({}), refused);
  assert.deepEqual(await status({ 'x-api-key': 'three' }), refused);
  assert.deepEqual(await status({ 'x-api-key': '' }), refused);
  assert.deepEqual(await status({ 'x-api-key': 'one' }), [200, undefined]);
  assert.deepEqual(await status({ authorization: 'Bearer one' }), [200, undefined]);
  assert.deepEqual(await status({ authorization: 'Bearer three', 'x-api-key': 'two' }), [200, undefined]);
  const [viaHeader, viaBearer, other] = harness.engine.requests.map(({ cacheSalt }) => cacheSalt);
  assert.equal(viaHeader, viaBearer);
  assert.notEqual(viaHeader, other);
  for (const [method, url, code, type] of [
    ['GET', '/v1/messages', 405, 'invalid_request_error'],
    ['POST', '/v1/messages/batches', 404, 'not_found_error'],
    ['POST', '/v1/messages/count_tokens?beta=true', 400, 'invalid_request_error'],
  ] as const) {
    const headers = { 'x-api-key': 'one', ...(method === 'POST' ? { 'content-type': 'application/json' } : {}) };
    const response = await harness.app.inject({
      method,
      url,
      headers,
      ...(method === 'POST' ? { payload: '{}' } : {}),
    });
    const body = JSON.parse(response.body);
    isError(body);
    assert.deepEqual([response.statusCode, body.error.type], [code, type]);
  }
  // Others keep theirs.
  const chat = await harness.chat({});
  assert.deepEqual([chat.status, chat.body.error.code], [401, 'invalid_api_key']);
  await harness.close();
});

test('an engine that is full, loading or broken', async () => {
  const harness = startHarness();
  for (const [code, status, type] of [
    ['queue_full', 429, 'rate_limit_error'],
    ['engine_restarting', 503, 'overloaded_error'],
    ['engine_failed', 500, 'api_error'],
  ] as const) {
    harness.engine.submitError = new ApiError(code, 'It says no.');
    for (const stream of [false, true]) {
      const response = await post(harness, { ...ASK, stream });
      isError(response.body);
      assert.deepEqual([response.status, response.body.error.type], [status, type]);
      assert.equal(response.headers['retry-after'], status === 500 ? undefined : '1');
    }
  }
  harness.engine.submitError = null;
  const failure = { finishReason: 'error', error: { code: 'engine_failed', message: 'The engine died.' } } as const;
  harness.engine.script = () => [{ tokens: harness.tokens('half', 'answer') }, failure];
  const events = await streamed(harness, ASK);
  assert.deepEqual(shapeOf(events), ['message_start', 'content_block_start', 'text_delta', 'error']);
  assert.deepEqual(events.at(-1).error, { type: 'api_error', message: 'The engine died.' });
  await harness.close();
});

test('pings keep a stream alive, after message_start, before the first token too', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 20, stallMs: 10_000 } });
  const tokens = harness.thought('a', 'b');
  harness.engine.script = function* () {
    yield sleep(90);
    yield { tokens: tokens.slice(0, 1), cachedTokens: 3 };
    yield sleep(90);
    yield { tokens: tokens.slice(1), cachedTokens: 3, finishReason: 'stop' };
  };
  const events = await streamed(harness, ASK);
  const shape = shapeOf(events);
  assert.deepEqual(shape.slice(0, 2), ['message_start', 'ping']);
  assert.ok(shape.indexOf('ping', shape.indexOf('thinking_delta')) > 0);
  // What came from the cache was not known at the start; the end corrects it.
  const numPrompt = harness.engine.requests[0]!.promptIds.length;
  assert.deepEqual(events[0].message.usage.input_tokens, numPrompt);
  const { usage } = events.find(({ type }) => type === 'message_delta');
  assert.deepEqual([usage.input_tokens, usage.cache_read_input_tokens], [numPrompt - 3, 3]);
  await harness.close();
});

test('draining refuses messages as overload', async () => {
  const drain = new Drain();
  const harness = startHarness({ drain });
  await drain.begin(0);
  const { status, body } = await post(harness, ASK);
  assert.deepEqual([status, body.error.type], [503, 'overloaded_error']);
  await harness.close();
});
