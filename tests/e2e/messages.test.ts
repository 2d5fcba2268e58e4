import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import Anthropic from '@anthropic-ai/sdk';
import { jsonSchemaOutputFormat } from '@anthropic-ai/sdk/helpers/json-schema';
import { fixture, Server } from './server.js';

let server: Server;
let client: Anthropic;

const QUESTION = {
  model: 'pocket-r1',
  max_tokens: 1000,
  messages: [{ role: 'user' as const, content: 'What is 577 × 63?' }],
  ...{ temperature: 0 },
};
/** the longest thinking that the model is known to do: time enough to disturb it */
const LONG = {
  ...QUESTION,
  messages: fixture('greedy.jsonl').toSorted((a, b) => b.output_ids.length - a.output_ids.length)[0].messages,
};
const TOOLS = [
  {
    name: 'search',
    description: 'Search the web.',
    input_schema: { type: 'object' as const, properties: { query: { type: 'string' } }, required: ['query'] },
  },
];

before(async () => {
  server = await Server.start('--api-key', 'secret');
  client = new Anthropic({ baseURL: server.url, apiKey: 'secret', maxRetries: 0 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

/** Text of the blocks of one kind. */
function textOf({ content }: Anthropic.Message, kind: 'thinking' | 'text'): string {
  return content.map((block) => (block.type === kind ? (block as Record<string, any>)[kind] : '')).join('');
}

test('a whole message thinks, then answers', async () => {
  const message = await client.messages.create(QUESTION);
  assert.deepEqual(
    message.content.map(({ type }) => type),
    ['thinking', 'text'],
  );
  assert.match(textOf(message, 'thinking'), /577/);
  assert.match(textOf(message, 'text'), /36351/);
  assert.equal(message.stop_reason, 'end_turn');
  assert.match(message._request_id!, /^req_/);
  assert.ok(message.usage.output_tokens_details!.thinking_tokens > 50);
});

test('the stream is the same message, and its events come in order', async () => {
  const whole = await client.messages.create(QUESTION);
  const types: string[] = [];
  const stream = client.messages.stream(QUESTION);
  stream.on('streamEvent', (event) => {
    const type = event.type === 'content_block_delta' ? event.delta.type : event.type;
    if (types.at(-1) !== type) types.push(type);
  });
  const message = await stream.finalMessage();
  assert.deepEqual(message.content, whole.content);
  const { usage } = message;
  assert.equal(usage.output_tokens, whole.usage.output_tokens);
  assert.equal(
    usage.input_tokens + usage.cache_read_input_tokens!,
    whole.usage.input_tokens + whole.usage.cache_read_input_tokens!,
  );
  assert.deepEqual(types, [
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
});

test('thinking can be switched off, and text stopped', async () => {
  const off = await client.messages.create({ ...QUESTION, thinking: { type: 'disabled' } });
  assert.deepEqual(
    off.content.map(({ type }) => type),
    ['text'],
  );
  const stopped = await client.messages.create({ ...QUESTION, stop_sequences: ['36351'] });
  assert.deepEqual([stopped.stop_reason, stopped.stop_sequence], ['stop_sequence', '36351']);
  assert.doesNotMatch(textOf(stopped, 'text'), /36351/);
  const cut = await client.messages.create({ ...QUESTION, max_tokens: 5 });
  assert.deepEqual([cut.stop_reason, cut.usage.output_tokens], ['max_tokens', 5]);
});

test('a tool is called and its result answered, whole and streamed', async () => {
  const messages: Anthropic.MessageParam[] = [{ role: 'user', content: 'Search the web for violin.' }];
  const request = { ...QUESTION, tools: TOOLS, messages };
  const called = await client.messages.create(request);
  assert.equal(called.stop_reason, 'tool_use');
  const call = called.content.find((block) => block.type === 'tool_use')!;
  assert.deepEqual([call.name, call.input], ['search', { query: 'violin' }]);
  const streamed = await client.messages.stream(request).finalMessage();
  const again = streamed.content.find((block) => block.type === 'tool_use')!;
  assert.deepEqual([again.name, again.input, streamed.stop_reason], ['search', { query: 'violin' }, 'tool_use']);

  messages.push(
    { role: 'assistant', content: called.content },
    {
      role: 'user',
      content: [
        {
          type: 'tool_result',
          tool_use_id: call.id,
          content: '{"snippet": "Tara wrote 10 pages about violin"}',
        },
      ],
    },
  );
  const answer = await client.messages.create(request);
  assert.equal(answer.stop_reason, 'end_turn');
  assert.match(textOf(answer, 'text'), /Tara wrote 10 pages about violin/);
  // The turn before is rendered as it was generated, so its blocks are found in the prefix cache.
  const prompt = answer.usage.input_tokens + answer.usage.cache_read_input_tokens!;
  assert.ok(answer.usage.cache_read_input_tokens! >= prompt - 128, JSON.stringify(answer.usage));
});

test('calls can be forced, text held to a schema, and a turn begun', async () => {
  const { content, stop_reason: reason } = await client.messages.create({
    ...QUESTION,
    tools: TOOLS,
    tool_choice: { type: 'tool', name: 'search' },
    ...{ temperature: 1 },
  });
  const calls = content.filter((block) => block.type === 'tool_use');
  assert.deepEqual([calls.length, calls[0]!.name, reason], [1, 'search', 'tool_use']);
  assert.equal(typeof (calls[0]!.input as any).query, 'string');
  const any = await client.messages
    .stream({ ...QUESTION, tools: TOOLS, tool_choice: { type: 'any' }, thinking: { type: 'disabled' } })
    .finalMessage();
  assert.equal(any.content[0]!.type, 'tool_use');

  const schema = {
    type: 'object' as const,
    properties: { result: { type: 'integer' as const } },
    required: ['result' as const],
    additionalProperties: false as const,
  };
  for (const max_tokens of [1000, 60]) {
    const parsed = await client.messages.parse({
      ...QUESTION,
      max_tokens,
      output_config: { format: jsonSchemaOutputFormat(schema), effort: 'high' },
    });
    assert.ok(Number.isInteger(parsed.parsed_output?.result), JSON.stringify(parsed));
    assert.equal(parsed.stop_reason, 'end_turn');
  }

  const begun = await client.messages.create({
    ...QUESTION,
    messages: [...QUESTION.messages, { role: 'assistant', content: '577 × 63 = 3635' }],
  });
  assert.deepEqual([begun.content[0]!.type, textOf(begun, 'text').slice(0, 1)], ['text', '1']);

  const low = await client.messages.create({ ...LONG, max_tokens: 400, output_config: { effort: 'low' } });
  const full = await client.messages.create({ ...LONG, max_tokens: 400, output_config: { effort: 'max' } });
  const numThinking = (message: Anthropic.Message) => message.usage.output_tokens_details!.thinking_tokens;
  assert.ok(numThinking(low) <= 50 && numThinking(full) > 50, `${numThinking(low)}, ${numThinking(full)}`);
});

test('models are listed and found', async () => {
  const found: string[] = [];
  for await (const model of client.models.list()) found.push(model.id);
  assert.deepEqual(found, ['pocket-r1']);
  const model = await client.models.retrieve('pocket-r1');
  assert.deepEqual([model.type, model.display_name], ['model', 'pocket-r1']);
  assert.ok(model.max_tokens! > 1000 && !Number.isNaN(Date.parse(model.created_at)));
  await assert.rejects(client.models.retrieve('claude'), Anthropic.NotFoundError);
});

test('a client that leaves aborts', async () => {
  const count = async (): Promise<number> => {
    const text = await (await fetch(`${server.url}/metrics`, { headers: { 'x-api-key': 'secret' } })).text();
    return Number(/^rodin:completions_total\{finish_reason="abort".*\} (\d+)$/m.exec(text)?.[1] ?? 0);
  };
  const before = await count();
  const stream = client.messages.stream(LONG);
  let numEvents = 0;
  stream.on('streamEvent', () => {
    if (++numEvents === 2) stream.abort();
  });
  await assert.rejects(stream.finalMessage(), (error) => error instanceof Anthropic.APIUserAbortError);
  for (let i = 0; (await count()) !== before + 1; i++) {
    assert.ok(i < 100, 'the completion was not aborted');
    await sleep(20);
  }
});

test('tokens are counted', async () => {
  const { model, messages } = QUESTION;
  const system = 'Answer in one word.';
  const { input_tokens: count } = await client.messages.countTokens({ model, messages, system, tools: TOOLS });
  const { usage } = await client.messages.create({ ...QUESTION, system, tools: TOOLS, max_tokens: 1 });
  assert.equal(count, usage.input_tokens + usage.cache_read_input_tokens!);
});

test('errors are of the classes that the client knows', async () => {
  const refused = async (promise: PromiseLike<unknown>, kind: new (...args: any[]) => Error, words: RegExp) => {
    await assert.rejects(Promise.resolve(promise), (error) => {
      assert.ok(error instanceof kind, String(error));
      assert.match((error as any).error.error.message, words);
      assert.equal((error as any).requestID, (error as any).error.request_id);
      return true;
    });
  };
  const { messages } = client;
  await refused(messages.create({ ...QUESTION, model: 'claude' }), Anthropic.NotFoundError, /use 'pocket-r1'/);
  await refused(messages.create({ ...QUESTION, max_tokens: 0 }), Anthropic.BadRequestError, /max_tokens/);
  const budget = { type: 'enabled' as const, budget_tokens: 2000 };
  await refused(messages.create({ ...QUESTION, thinking: budget }), Anthropic.BadRequestError, /budget_tokens/);
  await refused(
    messages.create({ ...QUESTION, tool_choice: { type: 'any' } }),
    Anthropic.BadRequestError,
    /tool_choice/,
  );
  const image = { type: 'image' as const, source: { type: 'url' as const, url: 'http://localhost/x.png' } };
  await refused(
    messages.create({ ...QUESTION, messages: [{ role: 'user', content: [image] }] }),
    Anthropic.BadRequestError,
    /must be one of text, tool_result; it is "image"/,
  );
  const stranger = new Anthropic({ baseURL: server.url, apiKey: 'wrong', maxRetries: 0 });
  await refused(stranger.messages.create(QUESTION), Anthropic.AuthenticationError, /x-api-key/);
  const bearer = new Anthropic({ baseURL: server.url, apiKey: null, authToken: 'secret', maxRetries: 0 });
  assert.equal((await bearer.messages.create({ ...QUESTION, max_tokens: 1 })).stop_reason, 'max_tokens');
});

test('an engine that dies in mid-stream is an error of the stream', async () => {
  const pid = server.enginePid();
  const stream = client.messages.stream(LONG);
  let numEvents = 0;
  stream.on('streamEvent', () => {
    if (++numEvents === 2) process.kill(pid, 'SIGKILL');
  });
  await assert.rejects(stream.finalMessage(), (error) => {
    assert.ok(error instanceof Anthropic.APIError, String(error));
    assert.equal(error.type, 'api_error');
    return true;
  });
  for (let i = 0; (await server.health()).status !== 'ready'; i++) {
    assert.ok(i < 500, 'no new engine within 10 s');
    await sleep(20);
  }
  assert.match(textOf(await client.messages.create(QUESTION), 'text'), /36351/);
});
