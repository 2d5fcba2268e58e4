import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { createDeepSeek } from '@ai-sdk/deepseek';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { HumanMessage, ToolMessage } from '@langchain/core/messages';
import { ChatOpenAI } from '@langchain/openai';
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool, type LanguageModel } from 'ai';
import OpenAI from 'openai';
import { fixture, Server } from './server.js';

const NAME = 'pocket-r1';
const QUESTION = 'What is 577 × 63?';
let server: Server;
let client: OpenAI;

before(async () => {
  server = await Server.start();
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

async function idle(): Promise<void> {
  const end = performance.now() + 10_000;
  while ((await server.metric('vllm:num_requests_running')) + (await server.metric('vllm:num_requests_waiting')) > 0) {
    assert.ok(performance.now() < end, 'the abort arrives');
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** A request of the fixtures that the model answers with a call of `search`. */
function toolRequest(): { messages: any[]; tools: any[] } {
  return fixture('greedy.jsonl').find((line) => line.tools);
}

test('openai: n choices, prefix, budget, completions', async () => {
  const messages = [{ role: 'user' as const, content: QUESTION }];
  const several = await client.chat.completions.create({ model: NAME, messages, n: 3, seed: 11, temperature: 1 });
  assert.deepEqual(
    several.choices.map(({ index }) => index),
    [0, 1, 2],
  );
  const second = await client.chat.completions.create({ model: NAME, messages, seed: 12, temperature: 1 });
  assert.deepEqual(several.choices[1]!.message, second.choices[0]!.message);
  const effort = await client.chat.completions.create({ model: NAME, messages, reasoning_effort: 'none' });
  assert.equal(effort.usage!.completion_tokens_details!.reasoning_tokens, 0);
  const prefixed = await client.chat.completions.create({
    model: NAME,
    messages: [...messages, { role: 'assistant', content: '577 × 63 = **', prefix: true } as any],
    temperature: 0,
    max_tokens: 8,
  });
  assert.match(prefixed.choices[0]!.message.content!, /^\d/);
  const text = await client.completions.create({ model: NAME, prompt: ['Sort', 'What is'], max_tokens: 4, echo: true });
  assert.equal(text.choices.length, 2);
  assert.match(text.choices[1]!.text, /^What is/);
  let streamed = '';
  for await (const chunk of await client.completions.create({
    model: NAME,
    prompt: 'Sort',
    max_tokens: 5,
    temperature: 0,
    stream: true,
  })) {
    streamed += chunk.choices[0]?.text ?? '';
  }
  const whole = await client.completions.create({ model: NAME, prompt: 'Sort', max_tokens: 5, temperature: 0 });
  assert.equal(streamed, whole.choices[0]!.text);
});

const ROUTE = {
  type: 'object' as const,
  properties: { line: { type: 'string' as const, maxLength: 12 }, stops: { type: 'integer' as const, minimum: 1 } },
  required: ['line', 'stops'],
  additionalProperties: false,
};

function isRoute(value: any): boolean {
  const keys = Object.keys(value).join();
  return keys === 'line,stops' && typeof value.line === 'string' && Number.isInteger(value.stops) && value.stops >= 1;
}

test('openai: output by JSON schema, whole and streamed', async () => {
  const request = {
    model: NAME,
    messages: [{ role: 'user' as const, content: QUESTION }],
    temperature: 1,
    response_format: { type: 'json_schema' as const, json_schema: { name: 'route', strict: true, schema: ROUTE } },
  };
  const whole = await client.chat.completions.parse({ ...request, seed: 5 });
  assert.ok(isRoute(whole.choices[0]!.message.parsed), whole.choices[0]!.message.content!);
  const final = await client.chat.completions.stream({ ...request, seed: 5 }).finalChatCompletion();
  assert.equal(final.choices[0]!.message.content, whole.choices[0]!.message.content);
});

const models: [name: string, make: () => LanguageModel, makeStructured?: () => LanguageModel][] = [
  ['@ai-sdk/deepseek', () => createDeepSeek({ baseURL: `${server.url}/v1`, apiKey: 'none' })(NAME)],
  [
    '@ai-sdk/openai-compatible',
    () => createOpenAICompatible({ name: 'rodin', baseURL: `${server.url}/v1`, includeUsage: true })(NAME),
    // It sends schemas only to servers that are said to know them.
    () => createOpenAICompatible({ name: 'rodin', baseURL: `${server.url}/v1`, supportsStructuredOutputs: true })(NAME),
  ],
];

for (const [name, make, makeStructured = make] of models) {
  test(`ai with ${name}: streaming with reasoning`, async () => {
    const result = streamText({ model: make(), prompt: QUESTION, temperature: 0, maxRetries: 0 });
    let reasoning = '';
    let text = '';
    for await (const part of result.fullStream) {
      assert.notEqual(part.type, 'error', JSON.stringify(part));
      if (part.type === 'reasoning-delta') {
        assert.equal(text, '');
        reasoning += part.text;
      }
      if (part.type === 'text-delta') text += part.text;
    }
    assert.match(reasoning, /577/);
    assert.match(text, /36351/);
    const usage = await result.usage;
    assert.ok(usage.outputTokens! > 50, JSON.stringify(usage));
    const whole = await generateText({ model: make(), prompt: QUESTION, temperature: 0, maxRetries: 0 });
    assert.deepEqual([whole.text, whole.reasoningText], [text, reasoning]);
  });

  test(`ai with ${name}: a tool call round trip`, async () => {
    const { messages, tools } = toolRequest();
    const asked: unknown[] = [];
    const result = await generateText({
      model: make(),
      messages,
      temperature: 0,
      maxRetries: 0,
      stopWhen: stepCountIs(2),
      tools: Object.fromEntries(
        tools.map(({ function: { name: own, description, parameters } }) => [
          own,
          tool({
            description,
            inputSchema: jsonSchema(parameters),
            execute: async (input: unknown) => {
              asked.push(own, input);
              return 'Violins are made in Cremona.';
            },
          }),
        ]),
      ),
    });
    assert.deepEqual(asked, ['search', { query: 'violin' }]);
    assert.equal(result.steps.length, 2);
    assert.ok(result.text.length > 0);
  });

  test(`ai with ${name}: output by JSON schema`, async () => {
    const { output } = await generateText({
      model: makeStructured(),
      prompt: QUESTION,
      temperature: 1,
      maxRetries: 0,
      output: Output.object({ schema: jsonSchema(ROUTE) }),
    });
    // The hosted API, which that client is made for, has JSON objects without schemas: it asks for these.
    assert.ok(name === '@ai-sdk/deepseek' ? typeof output === 'object' : isRoute(output), JSON.stringify(output));
  });

  test(`ai with ${name}: abort`, async () => {
    const controller = new AbortController();
    const prompt = 'Sort these words: ' + 'pear, apple, fig, '.repeat(20);
    const result = streamText({
      model: make(),
      prompt,
      maxRetries: 0,
      abortSignal: controller.signal,
      onError: () => {},
    });
    for await (const part of result.fullStream) if (part.type === 'reasoning-delta') controller.abort();
    await idle();
  });
}

test('@langchain/openai: streaming, a tool call round trip, output by JSON schema, abort', async () => {
  const model = new ChatOpenAI({
    model: NAME,
    apiKey: 'none',
    temperature: 0,
    maxRetries: 0,
    configuration: { baseURL: `${server.url}/v1` },
  });
  let text = '';
  for await (const chunk of await model.stream(QUESTION)) text += chunk.text;
  assert.match(text, /36351/);
  const { messages, tools } = toolRequest();
  const [{ content }] = messages;
  const bound = model.bindTools(tools);
  const human = new HumanMessage(content);
  const call = await bound.invoke([human]);
  assert.deepEqual(
    call.tool_calls!.map(({ name, args }) => [name, args]),
    [['search', { query: 'violin' }]],
  );
  const result = new ToolMessage({ content: 'Violins are made in Cremona.', tool_call_id: call.tool_calls![0]!.id! });
  const last = await bound.invoke([human, call, result]);
  assert.ok(last.text.length > 0);
  const structured = model.withStructuredOutput(ROUTE, { method: 'jsonSchema', name: 'route' });
  assert.ok(isRoute(await structured.invoke(QUESTION)));
  const controller = new AbortController();
  await assert.rejects(async () => {
    for await (const chunk of await model.stream(QUESTION, { signal: controller.signal })) {
      assert.ok(chunk);
      controller.abort();
    }
  });
  await idle();
});
