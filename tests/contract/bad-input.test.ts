import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { InjectOptions } from 'fastify';
import { ERROR_CODES, type ErrorCode } from '../../server/errors.js';
import { DOCUMENT, QUESTION, startHarness, validatorsOf } from './harness.js';

const validate = validatorsOf(DOCUMENT)('Error');
const raw = (end: string): string => `${JSON.stringify(QUESTION).slice(0, -1)}, ${end}}`;
const ask = (...messages: unknown[]): object => ({ ...QUESTION, messages });
const user = { role: 'user', content: 'x' };
const call = { id: 'a', type: 'function', function: { name: 'f', arguments: '{}' } };
const nested = (depth: number): unknown => (depth === 0 ? {} : { a: nested(depth - 1) });

/** [what is sent, status, code, param, words of the message] */
const TABLE: [body: unknown, status: number, code: ErrorCode, param: string | null, words?: RegExp][] = [
  // no JSON
  ['{"model": "pocket-r1", ', 400, 'invalid_json', null, /not valid JSON/],
  ['', 400, 'invalid_json', null, /empty/],
  [raw('"temperature": NaN'), 400, 'invalid_json', null],
  [raw('"temperature": Infinity'), 400, 'invalid_json', null],
  [raw('"__proto__": {"a": 1}'), 400, 'invalid_json', null],
  ['[]', 400, 'invalid_type', null, /must be an object/],
  ['"text"', 400, 'invalid_type', null],
  ['null', 400, 'invalid_type', null],
  // the model
  [{ messages: [user] }, 400, 'missing_required_parameter', 'model'],
  [{ ...QUESTION, model: 3 }, 400, 'invalid_type', 'model', /must be a string; it is an integer/],
  [{ ...QUESTION, model: 'gpt-4' }, 404, 'model_not_found', 'model', /use 'pocket-r1'/],
  // messages
  [{ model: 'pocket-r1' }, 400, 'missing_required_parameter', 'messages'],
  [{ ...QUESTION, messages: [] }, 400, 'invalid_value', 'messages', /at least 1 item/],
  [{ ...QUESTION, messages: 'hi' }, 400, 'invalid_type', 'messages', /must be an array; it is a string/],
  [{ ...QUESTION, messages: null }, 400, 'invalid_type', 'messages'],
  [ask('hi'), 400, 'invalid_type', 'messages[0]', /must be an object/],
  [ask({ content: 'x' }), 400, 'missing_required_parameter', 'messages[0].role'],
  [
    ask({ role: 'robot', content: 'x' }),
    400,
    'invalid_value',
    'messages[0].role',
    /system, developer, user, assistant, tool/,
  ],
  [ask({ role: 7, content: 'x' }), 400, 'invalid_type', 'messages[0].role'],
  [ask({ role: 'function', content: 'x' }), 400, 'unsupported_value', 'messages[0].role'],
  [ask(user, { role: 'user' }), 400, 'missing_required_parameter', 'messages[1].content'],
  [ask({ role: 'user', content: 3 }), 400, 'invalid_type', 'messages[0].content', /a string or an array/],
  [ask({ role: 'user', content: null }), 400, 'invalid_type', 'messages[0].content'],
  [ask({ role: 'user', content: [] }), 400, 'invalid_value', 'messages[0].content'],
  [ask({ role: 'user', content: ['x'] }), 400, 'invalid_type', 'messages[0].content[0]'],
  [
    ask({ role: 'user', content: [{ type: 'text' }] }),
    400,
    'missing_required_parameter',
    'messages[0].content[0].text',
  ],
  [
    ask({ role: 'user', content: [{ type: 'image_url', image_url: { url: 'http://169.254.169.254/' } }] }),
    400,
    'unsupported_value',
    'messages[0].content[0].type',
    /text only, not image_url/,
  ],
  [ask({ role: 'user', content: [{ type: 'input_audio' }] }), 400, 'unsupported_value', 'messages[0].content[0].type'],
  [ask({ role: 'user', content: [{ type: 'file' }] }), 400, 'unsupported_value', 'messages[0].content[0].type'],
  [ask(user, { role: 'assistant' }), 400, 'missing_required_parameter', 'messages[1].content'],
  [
    ask({ role: 'assistant', content: 'x', prefix: true }, user),
    400,
    'invalid_value',
    'messages[0].prefix',
    /last message/,
  ],
  [
    ask(user, { role: 'assistant', content: '', tool_calls: [call], prefix: true }),
    400,
    'invalid_value',
    'messages[1].prefix',
    /without tool calls/,
  ],
  [
    { ...QUESTION, continue_final_message: true, add_generation_prompt: false },
    400,
    'invalid_value',
    'continue_final_message',
  ],
  [
    { ...ask(user, { role: 'assistant', content: 'x' }), continue_final_message: true },
    400,
    'invalid_value',
    'add_generation_prompt',
  ],
  [{ ...QUESTION, add_generation_prompt: false }, 400, 'invalid_value', 'add_generation_prompt', /needs a turn/],
  [
    { ...ask(user, { role: 'assistant', reasoning_content: 'so' }), thinking: { type: 'disabled' } },
    400,
    'invalid_value',
    'messages[1].reasoning_content',
    /switched off/,
  ],
  [ask(user, { role: 'assistant', function_call: {} }), 400, 'unsupported_parameter', 'messages[1].function_call'],
  [
    ask(user, { role: 'assistant', content: 'x', reasoning: 'a', reasoning_content: 'b' }),
    400,
    'invalid_value',
    'messages[1].reasoning',
  ],
  [
    ask(user, { role: 'assistant', tool_calls: [{ ...call, function: { name: 'f', arguments: {} } }] }),
    400,
    'invalid_type',
    'messages[1].tool_calls[0].function.arguments',
  ],
  [ask(user, { role: 'tool', content: 'x' }), 400, 'missing_required_parameter', 'messages[1].tool_call_id'],
  [
    ask({ role: 'user', content: 'word '.repeat(40_000) }),
    400,
    'context_length_exceeded',
    'messages',
    /the context has 4096/,
  ],
  [ask({ role: 'user', content: '1'.repeat(4100) }), 400, 'context_length_exceeded', 'messages', /4104 tokens/],
  // numbers
  [{ ...QUESTION, temperature: -0.1 }, 400, 'invalid_value', 'temperature', /must be >= 0; it is -0.1/],
  [{ ...QUESTION, temperature: 2.1 }, 400, 'invalid_value', 'temperature'],
  [{ ...QUESTION, temperature: '0.5' }, 400, 'invalid_type', 'temperature', /must be a number; it is a string/],
  [{ ...QUESTION, temperature: true }, 400, 'invalid_type', 'temperature'],
  [raw('"temperature": 1e999'), 400, 'invalid_type', 'temperature', /too large a number/],
  [{ ...QUESTION, top_p: 0 }, 400, 'invalid_value', 'top_p'],
  [{ ...QUESTION, top_p: 1.01 }, 400, 'invalid_value', 'top_p'],
  [{ ...QUESTION, top_k: -2 }, 400, 'invalid_value', 'top_k'],
  [{ ...QUESTION, top_k: 1.5 }, 400, 'invalid_type', 'top_k', /an integer; it is a number with a fraction/],
  [{ ...QUESTION, min_p: 2 }, 400, 'invalid_value', 'min_p'],
  [{ ...QUESTION, presence_penalty: 3 }, 400, 'invalid_value', 'presence_penalty'],
  [{ ...QUESTION, frequency_penalty: -3 }, 400, 'invalid_value', 'frequency_penalty'],
  [{ ...QUESTION, repetition_penalty: 0 }, 400, 'invalid_value', 'repetition_penalty'],
  [{ ...QUESTION, n: 0 }, 400, 'invalid_value', 'n'],
  [{ ...QUESTION, n: 17 }, 400, 'invalid_value', 'n', /<= 16/],
  [{ ...QUESTION, n: 16384000 }, 400, 'invalid_value', 'n'],
  [{ ...QUESTION, max_tokens: 0 }, 400, 'invalid_value', 'max_tokens'],
  [{ ...QUESTION, max_tokens: -1 }, 400, 'invalid_value', 'max_tokens'],
  [{ ...QUESTION, max_tokens: 2 ** 53 }, 400, 'context_length_exceeded', 'max_tokens'],
  [
    { ...QUESTION, max_completion_tokens: 4096 },
    400,
    'context_length_exceeded',
    'max_completion_tokens',
    /at most \d+/,
  ],
  [{ ...QUESTION, max_tokens: 4, max_completion_tokens: 5 }, 400, 'invalid_value', 'max_tokens'],
  [{ ...QUESTION, min_tokens: 9, max_tokens: 8 }, 400, 'invalid_value', 'min_tokens'],
  [{ ...QUESTION, min_tokens: -1 }, 400, 'invalid_value', 'min_tokens'],
  [{ ...QUESTION, seed: 1.5 }, 400, 'invalid_type', 'seed'],
  [raw('"seed": 9223372036854775808'), 400, 'invalid_value', 'seed'],
  [raw('"seed": 1e30'), 400, 'invalid_value', 'seed'],
  // tokens
  [{ ...QUESTION, logit_bias: { 1024: 1 } }, 400, 'token_out_of_vocabulary', 'logit_bias[1024]', /0 to 1023/],
  [{ ...QUESTION, logit_bias: { '-1': 1 } }, 400, 'token_out_of_vocabulary', 'logit_bias.-1'],
  [
    { ...QUESTION, logit_bias: { '99999999999999999999': 1 } },
    400,
    'token_out_of_vocabulary',
    'logit_bias[99999999999999999999]',
  ],
  [{ ...QUESTION, logit_bias: { the: 1 } }, 400, 'invalid_value', 'logit_bias.the'],
  [{ ...QUESTION, logit_bias: { 5: 101 } }, 400, 'invalid_value', 'logit_bias[5]'],
  [{ ...QUESTION, logit_bias: { 5: 'x' } }, 400, 'invalid_type', 'logit_bias[5]'],
  [{ ...QUESTION, logit_bias: [1] }, 400, 'invalid_type', 'logit_bias'],
  [{ ...QUESTION, stop_token_ids: [1, 1024] }, 400, 'token_out_of_vocabulary', 'stop_token_ids[1]'],
  [{ ...QUESTION, stop_token_ids: [-1] }, 400, 'token_out_of_vocabulary', 'stop_token_ids[0]'],
  [{ ...QUESTION, stop_token_ids: [2 ** 31] }, 400, 'token_out_of_vocabulary', 'stop_token_ids[0]'],
  [{ ...QUESTION, stop_token_ids: [1.5] }, 400, 'invalid_type', 'stop_token_ids[0]'],
  [{ ...QUESTION, stop_token_ids: ['1'] }, 400, 'invalid_type', 'stop_token_ids[0]'],
  [{ ...QUESTION, stop_token_ids: 1 }, 400, 'invalid_type', 'stop_token_ids'],
  // stop strings, logprobs, streams
  [{ ...QUESTION, stop: '' }, 400, 'invalid_value', 'stop'],
  [{ ...QUESTION, stop: ['a', ''] }, 400, 'invalid_value', 'stop[1]'],
  [{ ...QUESTION, stop: Array(17).fill('a') }, 400, 'invalid_value', 'stop', /at most 16/],
  [{ ...QUESTION, stop: 5 }, 400, 'invalid_type', 'stop'],
  [{ ...QUESTION, stop: '\ud83d' }, 400, 'invalid_value', 'stop', /surrogate/],
  [{ ...QUESTION, top_logprobs: 2 }, 400, 'invalid_value', 'top_logprobs', /needs 'logprobs'/],
  [{ ...QUESTION, logprobs: true, top_logprobs: 21 }, 400, 'invalid_value', 'top_logprobs'],
  [{ ...QUESTION, logprobs: 5 }, 400, 'invalid_type', 'logprobs'],
  [{ ...QUESTION, stream: 'yes' }, 400, 'invalid_type', 'stream'],
  [{ ...QUESTION, stream_options: { include_usage: true } }, 400, 'invalid_value', 'stream_options'],
  [
    { ...QUESTION, stream: true, stream_options: { include_usage: 1 } },
    400,
    'invalid_type',
    'stream_options.include_usage',
  ],
  // thinking
  [{ ...QUESTION, thinking: 'on' }, 400, 'invalid_type', 'thinking', /must be an object/],
  [{ ...QUESTION, thinking: {} }, 400, 'missing_required_parameter', 'thinking.type'],
  [{ ...QUESTION, thinking: { type: 'adaptive' } }, 400, 'invalid_value', 'thinking.type', /"enabled", "disabled"/],
  [
    { ...QUESTION, thinking: { type: 'enabled' }, chat_template_kwargs: { thinking: false } },
    400,
    'invalid_value',
    'chat_template_kwargs.thinking',
    /contradict/,
  ],
  [{ ...QUESTION, chat_template_kwargs: { thinking: 'no' } }, 400, 'invalid_type', 'chat_template_kwargs.thinking'],
  [
    { ...QUESTION, chat_template_kwargs: { tokenize: true } },
    400,
    'unsupported_parameter',
    'chat_template_kwargs.tokenize',
  ],
  [
    { ...QUESTION, chat_template_kwargs: { chat_template: 'x' } },
    400,
    'unsupported_parameter',
    'chat_template_kwargs.chat_template',
  ],
  [{ ...QUESTION, chat_template: '{{ range(10000000) }}' }, 400, 'unsupported_parameter', 'chat_template'],
  // tools
  [{ ...QUESTION, tools: [{ type: 'function' }] }, 400, 'missing_required_parameter', 'tools[0].function'],
  [
    { ...QUESTION, tools: [{ type: 'function', function: {} }] },
    400,
    'missing_required_parameter',
    'tools[0].function.name',
  ],
  [{ ...QUESTION, tools: [{ type: 'custom', custom: {} }] }, 400, 'unsupported_value', 'tools[0].type'],
  [
    {
      ...QUESTION,
      tools: [
        { type: 'function', function: { name: 'f', strict: true, parameters: { properties: { a: { not: {} } } } } },
      ],
    },
    400,
    'invalid_value',
    'tools[0].function.parameters',
    /'\/properties\/a\/not'/,
  ],
  [
    { ...QUESTION, tools: [{ type: 'function', function: { name: 'f', parameters: nested(70) } }] },
    400,
    'invalid_value',
    'tools',
    /deeper than 64/,
  ],
  [{ ...QUESTION, tool_choice: 'required' }, 400, 'invalid_value', 'tool_choice', /no 'tools'/],
  [{ ...QUESTION, tool_choice: { type: 'function', function: { name: 'f' } } }, 400, 'invalid_value', 'tool_choice'],
  // known elsewhere, not here
  [{ ...QUESTION, response_format: { type: 'xml' } }, 400, 'invalid_value', 'response_format.type'],
  [{ ...QUESTION, response_format: 'json' }, 400, 'invalid_type', 'response_format'],
  [{ ...QUESTION, reasoning_effort: 'hard' }, 400, 'invalid_value', 'reasoning_effort', /minimal, low, medium/],
  [{ ...QUESTION, reasoning_effort: 1.5 }, 400, 'invalid_value', 'reasoning_effort', /from 0 to 1/],
  [{ ...QUESTION, think: 'often' }, 400, 'invalid_value', 'think'],
  [{ ...QUESTION, thinking_budget: -2 }, 400, 'invalid_value', 'thinking_budget'],
  [
    { ...QUESTION, thinking_budget: 5, max_thinking_tokens: 6 },
    400,
    'invalid_value',
    'max_thinking_tokens',
    /'thinking_budget'/,
  ],
  [
    { ...QUESTION, reasoning_effort: 'none', enable_thinking: true },
    400,
    'invalid_value',
    'reasoning_effort',
    /'enable_thinking'/,
  ],
  [{ ...QUESTION, reasoning_effort: 'low', think: 'high' }, 400, 'invalid_value', 'reasoning_effort', /'think'/],
  [{ ...QUESTION, thinking: { type: 'enabled' }, thinking_budget: 0 }, 400, 'invalid_value', 'thinking_budget'],
  [{ ...QUESTION, include_reasoning: true, reasoning: { exclude: true } }, 400, 'invalid_value', 'reasoning.exclude'],
  [{ ...QUESTION, custom_params: { other: 1 } }, 400, 'unsupported_parameter', 'custom_params.other'],
  [{ ...QUESTION, max_tokens: 20, min_answer_tokens: 19 }, 400, 'invalid_value', 'min_answer_tokens', /at most 18/],
  [{ ...QUESTION, stop_scope: 'reasoning' }, 400, 'invalid_value', 'stop_scope'],
  [{ ...QUESTION, priority: 1.5 }, 400, 'invalid_type', 'priority'],
  [{ ...QUESTION, guided_json: { type: 'strnig' } }, 400, 'invalid_value', 'guided_json', /'\/type'/],
  [{ ...QUESTION, modalities: ['audio'] }, 400, 'unsupported_value', 'modalities'],
  [{ ...QUESTION, echo: true }, 400, 'unsupported_value', 'echo'],
  [{ ...QUESTION, functions: [] }, 400, 'unsupported_parameter', 'functions'],
  // sizes
  [{ ...QUESTION, cache_salt: 'x'.repeat(129) }, 400, 'invalid_value', 'cache_salt'],
  [{ ...QUESTION, user: 'x'.repeat(513) }, 400, 'invalid_value', 'user'],
  [{ ...QUESTION, metadata: { a: 1 } }, 400, 'invalid_type', 'metadata.a'],
  [ask({ role: 'user', content: 'x'.repeat(8 << 20) }), 413, 'request_too_large', null, /--max-body-size/],
];

test('bad input gets status, code, param and a sentence; the engine sees none of it', async () => {
  const { chat, engine, close } = startHarness();
  for (const [body, status, code, param, words] of TABLE) {
    const shown = (typeof body === 'string' ? body : JSON.stringify(body)).slice(0, 200);
    const response = await chat(body);
    assert.ok(validate(response.body), `${shown}: ${response.text}`);
    const { error } = response.body as any;
    assert.deepEqual([response.status, error.code, error.param], [status, code, param], `${shown}\n${error.message}`);
    assert.equal(error.type, ERROR_CODES[code][1]);
    assert.match(error.message, words ?? /\.$/, shown);
    assert.match(error.message, /^[A-Z'].*\.$/s, shown);
  }
  assert.equal(engine.requests.length, 0);
  assert.equal((await chat(QUESTION)).status, 200);
  await close();
});

test('what says the same as the default is accepted, unknown fields too', async () => {
  const { chat, engine, close } = startHarness();
  const nulls = Object.fromEntries(
    [
      'stream',
      'stream_options',
      'max_tokens',
      'max_completion_tokens',
      'temperature',
      'top_p',
      'seed',
      'stop',
      'n',
      'logprobs',
      'top_logprobs',
      'logit_bias',
      'tools',
      'tool_choice',
      'response_format',
      'thinking',
      'user',
      'chat_template_kwargs',
      'metadata',
      'store',
      'reasoning_effort',
    ].map((name) => [name, null]),
  );
  const same = {
    n: 1,
    response_format: { type: 'text' },
    tool_choice: 'auto',
    parallel_tool_calls: true,
    modalities: ['text'],
    echo: false,
    skip_special_tokens: true,
    service_tier: 'auto',
    user: 'me',
    store: true,
    metadata: { a: 'b' },
    something_new: { a: 1 },
    max_tokens: 5,
    max_completion_tokens: 5,
    thinking: { type: 'disabled' },
    chat_template_kwargs: { thinking: false, enable_thinking: false },
    best_of: 1,
  };
  for (const extra of [nulls, same]) assert.deepEqual((await chat({ ...QUESTION, ...extra })).status, 200);
  assert.equal(engine.requests[1]!.startPhase, 'answer');
  assert.equal(engine.requests[1]!.sampling.maxTokens, 5);
  await close();
});

test('paths, methods, media types and headers', async () => {
  const { app, close } = startHarness();
  const post = { method: 'POST', url: '/v1/chat/completions' } as const;
  const json = { 'content-type': 'application/json' };
  for (const [request, status, code] of [
    [{ url: '/nowhere' }, 404, 'not_found'],
    [{ url: '/v1/completions' }, 405, 'method_not_allowed'],
    [{ url: '/v1/chat/completions' }, 400, 'missing_required_parameter'],
    [{ url: '/v1/chat/completions', headers: { 'last-event-id': 'chatcmpl-1:2' } }, 404, 'not_found'],
    [{ method: 'DELETE', url: '/v1/models/a/b' }, 405, 'method_not_allowed'],
    [{ ...post, headers: { 'content-type': 'text/plain' }, payload: '{}' }, 415, 'unsupported_media_type'],
    [
      { ...post, headers: { 'content-type': 'multipart/form-data; boundary=x' }, payload: 'x' },
      415,
      'unsupported_media_type',
    ],
    [{ ...post, headers: { 'content-type': 'application/jsonx' }, payload: '{}' }, 415, 'unsupported_media_type'],
    [{ ...post, payload: '{}' }, 415, 'unsupported_media_type'],
    [{ ...post, headers: json }, 400, 'invalid_json'],
    [{ url: '/v1/models/%' }, 400, 'invalid_value'],
    [{ url: `/v1/models/${'x'.repeat(600)}` }, 404, null],
  ] as const) {
    const response = await app.inject(request as InjectOptions);
    const body = JSON.parse(response.body);
    assert.ok(validate({ ...body }), response.body);
    assert.equal(response.statusCode, status, JSON.stringify(request).slice(0, 100) + response.body);
    if (code) assert.equal(body.error.code, code);
    if (status === 405) assert.ok(response.headers['allow']);
  }
  const { statusCode } = await app.inject({
    ...post,
    headers: { 'content-type': 'Application/JSON; charset=utf-8' },
    payload: JSON.stringify(QUESTION),
  });
  assert.equal(statusCode, 200);
  await close();
});
