import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import OpenAI from 'openai';
import { ResponsesWS } from 'openai/resources/responses/ws';
import { checkEvents } from '../contract/response-check.js';
import { Frames } from '../helpers/frames.js';
import { fixture, Server } from './server.js';

let server: Server;
let client: OpenAI;

const ASK = { model: 'pocket-r1', input: 'What is 577 × 63?', temperature: 0 };
/** an answer of several thousand tokens */
const LIST = { type: 'array', items: { type: 'integer' }, minItems: 1000 };
const LONG = { ...ASK, text: { format: { type: 'json_schema', name: 'list', schema: LIST } } };
const SEARCH = {
  type: 'function' as const,
  name: 'search',
  description: 'Search the web.',
  parameters: { type: 'object', properties: { query: { type: 'string' } }, required: ['query'] },
  strict: false,
};

before(async () => {
  server = await Server.start();
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

const open = (): Promise<Frames> => Frames.open(server.url);

/** Waits until no sequence runs or waits; returns how long that took. */
async function idle(maxMs: number): Promise<number> {
  const start = performance.now();
  for (;;) {
    const { num_running: running, num_waiting: waiting } = await server.health();
    const ms = performance.now() - start;
    if (running + waiting === 0) return ms;
    assert.ok(ms < maxMs, `${running} sequences run after ${ms} ms`);
    await sleep(5);
  }
}

test('an agent’s loop with the client’s WebSocket: a tool is called, its output sent, nothing stored', async () => {
  const ws = new ResponsesWS(client);
  // The lane is a field that this version of the client sends, and has no type for.
  const lane = { stream_id: 'main' } as object;
  const create = { type: 'response.create' as const, ...ASK, store: false, tools: [SEARCH], ...lane };
  const events: any[] = [];
  let numTurns = 0;
  try {
    ws.send({ ...create, input: 'Search the web for violin.' });
    for await (const event of ws) {
      if (event.type === 'error') throw event.error;
      if (event.type !== 'message') continue;
      const { message } = event;
      events.push(message);
      assert.equal((message as any).stream_id, 'main');
      if (message.type !== 'response.completed') continue;
      numTurns++;
      const call = message.response.output.find((item) => item.type === 'function_call');
      if (call === undefined) break;
      assert.deepEqual(JSON.parse(call.arguments), { query: 'violin' });
      const output = '{"snippet": "Tara wrote 10 pages about violin"}';
      ws.send({
        ...create,
        previous_response_id: message.response.id,
        input: [{ type: 'function_call_output', call_id: call.call_id, output }],
      });
    }
  } finally {
    ws.close();
  }
  assert.equal(numTurns, 2);
  const second = events.findIndex(({ type }) => type === 'response.completed') + 1;
  checkEvents(events.slice(0, second));
  const last = checkEvents(events.slice(second));
  assert.match(last.output.at(-1).content[0].text, /Tara wrote 10 pages about violin/);
});

test('64 lanes on 8 sockets: each gives what it gives alone, and none waits for another to end', async () => {
  const rows = fixture('greedy.jsonl')
    .filter(({ tools, thinking, output_ids: ids }) => !tools && thinking && ids.length > 60)
    .slice(0, 8);
  const alone = await open();
  for (const { messages } of rows) alone.create({ ...ASK, input: messages });
  const expected = await Promise.all(rows.map((_, index) => alone.ended(undefined, index + 1)));
  await alone.close();
  const sockets = await Promise.all(Array.from({ length: 8 }, open));
  const lanes = Array.from({ length: 64 }, (_, index) => ({
    frames: sockets[index % 8]!,
    streamId: `lane-${index}`,
    at: (index + Math.floor(index / 8)) % 8,
  }));
  for (const { frames, streamId, at } of lanes) {
    frames.create({ ...ASK, stream_id: streamId, input: rows[at].messages });
  }
  const responses = await Promise.all(lanes.map(({ frames, streamId }) => frames.ended(streamId)));
  const textsOf = ({ output }: any): string[] =>
    output.flatMap(({ content }: any) => content.map(({ text }: any) => text));
  for (const [index, { frames, streamId, at }] of lanes.entries()) {
    assert.deepEqual(checkEvents(frames.of(streamId)), responses[index]);
    assert.deepEqual(textsOf(responses[index]), textsOf(expected[at]));
  }
  // On a fast device a socket's first lane may be over before the prompt of its last is read.
  for (const { all } of sockets) {
    const running = new Set<string>();
    let most = 0;
    for (const { type, stream_id: streamId } of all) {
      if (type.endsWith('.delta')) running.add(streamId);
      if (type === 'response.completed') running.delete(streamId);
      most = Math.max(most, running.size);
    }
    assert.ok(most >= 4, `${most} lanes of 8 ran together`);
  }
  await Promise.all(sockets.map((frames) => frames.close()));
});

test('closing sockets frees their blocks within 250 ms', async (context) => {
  await idle(5000);
  const sockets = await Promise.all(Array.from({ length: 4 }, open));
  for (const [index, frames] of sockets.entries()) {
    for (let lane = 0; lane < 8; lane++) {
      const seed = 8 * index + lane;
      frames.create({ ...LONG, temperature: 1, seed, stream_id: `lane-${lane}`, store: false });
    }
  }
  await Promise.all(sockets.map((frames) => frames.until(({ type }) => type === 'response.reasoning_text.delta')));
  assert.ok((await server.health()).num_running > 0);
  for (const frames of sockets) frames.socket.terminate();
  const ms = await idle(250);
  context.diagnostic(`after ${ms.toFixed(0)} ms`);
  assert.equal(await server.metric('rodin:blocks{state="referenced"'), 0, `after ${ms} ms`);
});

test('a prompt computed ahead is found in the prefix cache by the response that goes on with it', async () => {
  const frames = await open();
  const facts = Array.from({ length: 40 }, (_, index) => `Fact ${index}: ${index} + ${index} = ${2 * index}.`).join(
    ' ',
  );
  frames.create({ ...ASK, input: [{ role: 'user', content: facts }], generate: false, store: false });
  const ahead = await frames.ended();
  assert.deepEqual([ahead.status, ahead.output, ahead.usage.output_tokens], ['completed', [], 0]);
  frames.create({ ...ASK, previous_response_id: ahead.id, store: false });
  const answered = await frames.ended(undefined, 2);
  const { cached_tokens: cached } = answered.usage.input_tokens_details;
  assert.ok(cached >= ahead.usage.input_tokens - 64 && cached > 64, `${cached} of ${ahead.usage.input_tokens}`);
  await frames.close();
});

/**
 * A response whose reasoning is extended by so much that there is time to do something with it; again where it was over
 * before the client had a turn. Returns its id.
 */
async function thinkLong(frames: Frames, streamId: string, tokens: number): Promise<string> {
  for (let attempt = 0; attempt < 10; attempt++) {
    frames.all.length = 0;
    frames.create({ ...ASK, stream_id: streamId });
    const { response } = await frames.until(({ type }) => type === 'response.created');
    frames.send({ type: 'response.control', action: 'extend_thinking', response_id: response.id, tokens });
    const shown = (): number => frames.all.map(({ delta }) => delta ?? '').join('').length;
    const last = await frames.until(({ type }) => /^error|completed$/.test(type) || shown() > 600);
    if (last.type !== 'error' && last.type !== 'response.completed') return response.id;
    await frames.ended(streamId);
  }
  throw new Error('the response was always over before it could be steered');
}

test('live control: more thinking, an answer now, and an end', async () => {
  const frames = await open();
  const control = (fields: object): void => frames.send({ type: 'response.control', ...fields });
  const lengthOf = (response: any): number => response.usage.output_tokens_details.reasoning_tokens;

  await thinkLong(frames, 'more', 500);
  const more = await frames.ended('more');
  checkEvents(frames.all);
  assert.deepEqual([more.status, lengthOf(more) >= 500], ['completed', true]);

  const id = await thinkLong(frames, 'now', 3000);
  control({ action: 'end_thinking', response_id: id });
  const now = await frames.ended('now');
  checkEvents(frames.all);
  assert.equal(now.status, 'completed');
  assert.ok(now.output.some(({ type }: any) => type === 'message'));
  assert.ok(lengthOf(now) < 3000, `${lengthOf(now)} tokens`);

  await thinkLong(frames, 'end', 3000);
  control({ action: 'cancel', stream_id: 'end' });
  const end = await frames.ended('end');
  checkEvents(frames.all);
  assert.equal(end.status, 'cancelled');
  await idle(250);
  await frames.close();
});
