import assert from 'node:assert/strict';
import { test } from 'node:test';
import { eventsOf, QUESTION, startHarness } from '../contract/harness.js';

const PHRASE = '\nEnough.\n';

test('every spelling of thinking comes to the same', async () => {
  const { chat, engine, prompts, close } = startHarness({ args: ['--thinking-end-phrase', PHRASE] });
  const phrase = prompts.tokenizer.encodeText(PHRASE);
  const ask = async (body: object): Promise<(typeof engine.requests)[number]> => {
    const { status, text } = await chat({ ...QUESTION, ...body });
    assert.equal(status, 200, text);
    return engine.requests.at(-1)!;
  };
  for (const off of [
    { thinking: { type: 'disabled' } },
    { chat_template_kwargs: { thinking: false } },
    { chat_template_kwargs: { enable_thinking: false } },
    { chat_template_kwargs: { reasoning_effort: 'none' } },
    { enable_thinking: false },
    { reasoning_effort: 'none' },
    { reasoning_effort: 0 },
    { reasoning: { effort: 'none' } },
    { reasoning: { enabled: false } },
    { think: false },
    { think: 'none' },
    { output_config: { effort: 'none' } },
    { thinking_budget: 0 },
    { thinking: { type: 'disabled' }, thinking_budget: 100 },
  ]) {
    assert.equal((await ask(off)).startPhase, 'answer', JSON.stringify(off));
  }
  for (const limit of [
    { thinking: { type: 'enabled', budget_tokens: 100 } },
    { reasoning: { max_tokens: 100 } },
    { thinking_budget: 100 },
    { thinking_token_budget: 100 },
    { max_thinking_tokens: 100 },
    { thinking_budget_tokens: 100 },
    { reasoning_budget_tokens: 100 },
    { custom_params: { thinking_budget: 100 } },
    { chat_template_kwargs: { thinking_budget: 100 } },
    { reasoning_effort: 'high', thinking_budget: 100, enable_thinking: true },
    { reasoning_effort: 'medium', max_tokens: 400 },
    { reasoning_effort: 0.25, max_tokens: 400 },
    { reasoning: { effort: 'low' }, max_tokens: 800 },
    { think: 'high', max_tokens: 200 },
    { output_config: { effort: 'medium' }, max_tokens: 400 },
  ]) {
    const { thinking, startPhase } = await ask(limit);
    assert.equal(startPhase, 'reasoning');
    assert.deepEqual(
      [thinking!.budget, thinking!.endIds],
      [100 - phrase.length, [...phrase, 6]],
      JSON.stringify(limit),
    );
  }
  for (const none of [
    {},
    { thinking_token_budget: -1 },
    { reasoning_effort: 'max' },
    { think: true },
    { reasoning_effort: 1 },
  ]) {
    assert.equal((await ask(none)).thinking!.budget, Infinity, JSON.stringify(none));
  }
  // A budget too small for the phrase has the marker alone.
  assert.deepEqual((await ask({ thinking_budget: 3 })).thinking, {
    budget: 3,
    endIds: [6],
    extendIds: prompts.tokenizer.encodeText('\nWait, let me check that again.\n'),
    minAnswerTokens: 510,
    loopTokens: 256,
  });
  assert.equal((await ask({ max_tokens: 511 })).thinking!.minAnswerTokens, 0);
  assert.equal((await ask({ max_tokens: 512 })).thinking!.minAnswerTokens, 64);
  assert.equal(
    (await ask({ max_tokens: 100, min_answer_tokens: 50, thinking_loop_tokens: 9 })).thinking!.minAnswerTokens,
    50,
  );
  assert.equal((await ask({ thinking_loop_tokens: 9, priority: -4 })).thinking!.loopTokens, 9);
  assert.equal(engine.requests.at(-1)!.priority, -4);
  await close();
});

test('reasoning can be left out, put into the content, or sent in one piece', async () => {
  const harness = startHarness();
  const tokens = harness
    .thought('Let me see.', 'It is 4.')
    .map((token) => ({ ...token, logprobs: { logprob: -1, top: [] } }));
  harness.engine.script = function* () {
    for (const [i, token] of tokens.entries())
      yield { tokens: [token], ...(i === tokens.length - 1 ? { finishReason: 'stop' } : {}) };
  };
  const read = async (body: object): Promise<any> => {
    const whole = (await harness.chat({ ...QUESTION, logprobs: true, ...body })).body;
    const chunks = eventsOf((await harness.chat({ ...QUESTION, ...body, stream: true })).text).slice(0, -1);
    const deltas = chunks.map(({ choices }) => choices[0].delta);
    const { message } = whole.choices[0];
    assert.equal(deltas.map((delta) => delta.content ?? '').join(''), message.content);
    assert.equal(deltas.map((delta) => delta.reasoning_content ?? '').join(''), message.reasoning_content ?? '');
    return { message, deltas, whole };
  };
  for (const body of [{ include_reasoning: false }, { reasoning: { exclude: true } }]) {
    const { message, whole } = await read(body);
    assert.deepEqual([message.content, 'reasoning_content' in message], ['It is 4.', false]);
    assert.ok(whole.usage.completion_tokens_details.reasoning_tokens > 0);
    assert.ok(!('reasoning_content' in whole.choices[0].logprobs));
  }
  const inline = await read({ separate_reasoning: false });
  assert.equal(inline.message.content, '<think>Let me see.</think>It is 4.');
  const { deltas } = await read({ stream_reasoning: false });
  assert.deepEqual(
    deltas.filter((delta: any) => delta.reasoning_content).map((delta: any) => delta.reasoning_content),
    ['Let me see.'],
  );
  await harness.close();
});

test('what ended the reasoning stands in the choice', async () => {
  const harness = startHarness();
  const [first, ...rest] = harness.thought('so', 'four');
  harness.engine.script = () => [
    { tokens: [first!], reasoningEnded: 'budget' },
    { tokens: rest, finishReason: 'stop', reasoningEnded: 'budget' },
  ];
  assert.equal((await harness.chat(QUESTION)).body.choices[0].reasoning_ended, 'budget');
  const chunks = eventsOf((await harness.chat({ ...QUESTION, stream: true })).text).slice(0, -1);
  assert.deepEqual(chunks.map(({ choices }) => choices[0].reasoning_ended).filter(Boolean), ['budget']);
  assert.equal(chunks.at(-1).choices[0].reasoning_ended, 'budget');
  await harness.close();
});

test('n choices: the leader first, seeds count up, streams alternate, usage counts the prompt once', async () => {
  const harness = startHarness();
  const body = { ...QUESTION, n: 3, seed: 9223372036854775000 };
  harness.engine.script = (request) => {
    const index = Number(/-(\d)$/.exec(request.requestId)?.[1] ?? 0);
    const tokens = harness.thought('a b c', `answer ${index}`);
    return tokens.map((token, i) => ({
      tokens: [token],
      ...(i === tokens.length - 1 ? { finishReason: 'stop' as const } : {}),
    }));
  };
  const { body: whole } = await harness.chat({ ...QUESTION, n: 3, seed: 5 });
  assert.deepEqual(
    whole.choices.map((choice: any) => [choice.index, choice.message.content]),
    [
      [0, 'answer 0'],
      [1, 'answer 1'],
      [2, 'answer 2'],
    ],
  );
  assert.deepEqual(
    harness.engine.requests.map(({ sampling }) => sampling.seed),
    [5n, 6n, 7n],
  );
  const numPrompt = harness.engine.requests[0]!.promptIds.length;
  assert.equal(whole.usage.prompt_tokens, numPrompt);
  assert.equal(whole.usage.completion_tokens, 3 * harness.thought('a b c', 'answer 0').length);
  const events = eventsOf(
    (
      await harness.chat({
        ...body,
        stream: true,
        stream_options: { include_usage: true, continuous_usage_stats: true },
      })
    ).text,
  );
  assert.equal(events.pop(), '[DONE]');
  const usage = events.pop();
  assert.equal(usage.usage.completion_tokens, whole.usage.completion_tokens);
  for (const index of [0, 1, 2]) {
    const own = events.filter(({ choices }) => choices[0].index === index);
    assert.equal(own.map(({ choices }) => choices[0].delta.content ?? '').join(''), `answer ${index}`);
    assert.equal(own[0].choices[0].delta.role, 'assistant');
    assert.equal(own.filter(({ choices }) => choices[0].finish_reason).length, 1);
  }
  const order = events.map(({ choices }) => choices[0].index);
  assert.ok(order.indexOf(1) < order.lastIndexOf(0), order.join(''));
  const counts = events.map((event) => event.usage.completion_tokens);
  assert.deepEqual(
    counts,
    [...counts].sort((a, b) => a - b),
  );
  // One failure ends all, and what runs is aborted.
  harness.engine.script = (request) =>
    request.requestId.endsWith('-1')
      ? [{ finishReason: 'error', error: { code: 'engine_failed', message: 'x' } }]
      : harness.tokens('word '.repeat(50), 'answer').map((token) => ({ tokens: [token] }));
  assert.equal((await harness.chat(body)).status, 500);
  await harness.close();
});

test('prefix completion: content, reasoning, and both', async () => {
  const { chat, engine, prompts, close } = startHarness();
  const { tokenizer } = prompts;
  const base = (await prompts.encode({ messages: [QUESTION.messages[0] as any], tools: null })).ids;
  const ids = async (message: object, extra: object = {}): Promise<[number[], string]> => {
    const { status, text } = await chat({
      ...QUESTION,
      messages: [...QUESTION.messages, { role: 'assistant', ...message }],
      ...extra,
    });
    assert.equal(status, 200, text);
    const request = engine.requests.at(-1)!;
    return [request.promptIds, request.startPhase];
  };
  const text = (words: string): number[] => tokenizer.encodeText(words);
  for (const extra of [{}, { continue_final_message: true, add_generation_prompt: false }]) {
    assert.deepEqual(await ids({ content: 'It is' }, extra), [[...base, 6, ...text('It is')], 'answer']);
  }
  assert.deepEqual(await ids({ content: 'It </think> is', prefix: true }), [
    [...base, 6, ...text('It </think> is')],
    'answer',
  ]);
  assert.deepEqual(await ids({ content: '', reasoning_content: 'Well,', prefix: true }), [
    [...base, ...text('Well,')],
    'reasoning',
  ]);
  assert.deepEqual(await ids({ reasoning_content: 'Well,', prefix: true }), [[...base, ...text('Well,')], 'reasoning']);
  assert.deepEqual(await ids({ content: 'It', reasoning_content: 'Well,' }), [
    [...base, ...text('Well,'), 6, ...text('It')],
    'answer',
  ]);
  const off = [...base.slice(0, -1), 6];
  assert.deepEqual(await ids({ content: 'It' }, { enable_thinking: false }), [[...off, ...text('It')], 'answer']);
  await close();
});

test('one call only, where calls may not be parallel; stop strings in reasoning, where asked for', async () => {
  const harness = startHarness();
  const call = (name: string): { id: number; phase: 'tool' }[] => [
    { id: 9, phase: 'tool' },
    ...(harness.tokens(name, 'tool') as { id: number; phase: 'tool' }[]),
    { id: 11, phase: 'tool' },
    ...(harness.tokens('{}', 'tool') as { id: number; phase: 'tool' }[]),
    { id: 10, phase: 'tool' },
  ];
  harness.engine.script = () => [
    { tokens: [{ id: 7, phase: 'control' }, ...call('one'), ...call('two')] },
    { tokens: [{ id: 8, phase: 'control' }], finishReason: 'stop' },
  ];
  const { body } = await harness.chat({ ...QUESTION, parallel_tool_calls: false });
  assert.deepEqual(
    body.choices[0].message.tool_calls.map((c: any) => c.function.name),
    ['one'],
  );
  assert.equal(body.choices[0].finish_reason, 'tool_calls');
  assert.equal(harness.engine.aborted.length, 1);
  harness.engine.script = () => [{ tokens: harness.thought('one END two', 'three'), finishReason: 'stop' }];
  const stopped = (await harness.chat({ ...QUESTION, stop: 'END', stop_scope: 'all' })).body.choices[0];
  assert.deepEqual(
    [stopped.message.reasoning_content, stopped.message.content, stopped.finish_reason],
    ['one ', null, 'stop'],
  );
  assert.equal((await harness.chat({ ...QUESTION, stop: 'END' })).body.choices[0].message.content, 'three');
  await harness.close();
});

test('the context is the one that the engine has', async () => {
  const { chat, app, engine, close } = startHarness();
  if (engine.engineState.status === 'ready') engine.engineState.maxContext = 50;
  assert.equal(JSON.parse((await app.inject({ url: '/v1/models' })).body).data[0].max_model_len, 50);
  await chat(QUESTION);
  assert.equal(engine.requests[0]!.promptIds.length + engine.requests[0]!.sampling.maxTokens, 50);
  await close();
});
