import assert from 'node:assert/strict';
import { request as httpRequest, type ClientRequest, type IncomingMessage } from 'node:http';
import { connect, type Socket } from 'node:net';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Drain } from '../../server/api/drain.js';
import { EventLog } from '../../server/api/event-log.js';
import { SseWriter } from '../../server/api/sse.js';
import type { EngineEvent } from '../../server/engine/request.js';
import { oneByOne, type Script } from '../contract/fake-engine.js';
import { eventsOf, QUESTION, startHarness, type Harness } from '../contract/harness.js';

function post(address: string, body: unknown): Promise<{ request: ClientRequest; response: Promise<IncomingMessage> }> {
  const request = httpRequest(`${address}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
  });
  const response = new Promise<IncomingMessage>((resolve, reject) =>
    request.on('response', resolve).on('error', reject),
  );
  response.catch(() => {});
  request.end(JSON.stringify(body));
  return Promise.resolve({ request, response });
}

async function until(condition: () => boolean, what: string, ms = 3000): Promise<void> {
  const end = performance.now() + ms;
  while (!condition()) {
    assert.ok(performance.now() < end, `still waiting for: ${what}`);
    await sleep(5);
  }
}

/** tokens for ever, one every `ms` */
function endless(harness: Harness, ms: number, text = 'more '): Script {
  const tokens = harness.tokens(text, 'answer');
  return function* () {
    for (;;) {
      yield { tokens };
      yield sleep(ms);
    }
  };
}

async function text(response: IncomingMessage): Promise<string> {
  let all = '';
  for await (const part of response) all += String(part);
  return all;
}

test('a client that leaves aborts its sequence, streaming or not', async () => {
  const harness = startHarness();
  harness.engine.script = endless(harness, 5);
  const address = await harness.listen();
  for (const stream of [true, false]) {
    const before = harness.engine.requests.length;
    const { request, response } = await post(address, { ...QUESTION, stream });
    if (stream) (await response).once('data', () => request.destroy());
    else {
      await until(() => harness.engine.requests.length > before, 'submission');
      request.destroy();
    }
    request.on('error', () => {});
    await until(() => harness.engine.requests.length > before && harness.engine.numOpen === 0, 'abort');
  }
  assert.equal(harness.engine.aborted.length, 2);
  const { body } = await harness.app.inject({ url: '/metrics' });
  assert.match(body, /^rodin:completions_total\{finish_reason="abort".*\} 2$/m);
  await harness.close();
});

test('a client that leaves while waiting for its first token aborts too', async () => {
  const harness = startHarness({
    script: function* () {
      for (let i = 0; i < 400; i++) yield sleep(5);
      yield { finishReason: 'stop' };
    },
  });
  const address = await harness.listen();
  for (const stream of [true, false]) {
    const { request } = await post(address, { ...QUESTION, stream });
    request.on('error', () => {});
    await until(() => harness.engine.numOpen === 1, 'submission');
    request.destroy();
    await until(() => harness.engine.numOpen === 0, 'abort', 3000);
  }
  await harness.close();
});

test('what finished is not aborted', async () => {
  const harness = startHarness();
  const address = await harness.listen();
  const { response } = await post(address, { ...QUESTION, stream: true });
  assert.equal(eventsOf(await text(await response)).at(-1), '[DONE]');
  await harness.chat(QUESTION);
  assert.deepEqual(harness.engine.aborted, []);
  await harness.close();
});

/** Sends a request and then reads nothing. */
function stalledReader(address: string): Promise<Socket> {
  const { port, hostname } = new URL(address);
  const body = JSON.stringify({ ...QUESTION, stream: true });
  return new Promise((resolve) => {
    const socket = connect({ port: Number(port), host: hostname }, () => {
      socket.pause();
      socket.write(
        `POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n` +
          `content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
      );
      resolve(socket);
    });
    socket.on('error', () => {});
  });
}

test('a client that does not read is merged for, and gets everything when it reads again', async () => {
  const harness = startHarness();
  const numEvents = 3000;
  const tokens = harness.tokens(' word'.repeat(2000), 'answer'); // 30 MB in all, more than the kernel takes
  let numSent = 0;
  harness.engine.script = function* () {
    for (; numSent < numEvents; numSent++) {
      yield { tokens };
      if (numSent % 50 === 0) yield sleep(1);
    }
    yield { finishReason: 'length' } satisfies Partial<EngineEvent>;
  };
  const address = await harness.listen();
  const socket = await stalledReader(address);
  await until(() => numSent === numEvents, 'the engine, which waits for no reader', 60_000);
  let received = '';
  socket.on('data', (part) => (received += part.toString()));
  socket.resume();
  await until(() => received.includes('data: [DONE]'), 'the rest', 30_000);
  socket.destroy();
  const body = received.slice(received.indexOf('\r\n\r\n') + 4).replace(/(^|\r\n)[0-9a-f]+\r\n/g, '');
  const chunks = eventsOf(body).slice(0, -1);
  const content = chunks.map((chunk) => chunk.choices[0].delta.content ?? '').join('');
  assert.equal(content.length, numEvents * 2000 * ' word'.length);
  assert.ok(chunks.length < numEvents / 2, `${chunks.length} chunks`);
  await harness.close();
});

test('a client that never reads is cut off', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 50, stallMs: 200 } });
  harness.engine.script = endless(harness, 1, ' word'.repeat(5000));
  const address = await harness.listen();
  const socket = await stalledReader(address);
  await until(() => harness.engine.numOpen === 1, 'submission');
  await until(() => harness.engine.numOpen === 0, 'the cut', 10_000);
  socket.destroy();
  await harness.close();
});

test('comments keep a stream alive, before the first token too', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 20, stallMs: 10_000 } });
  const tokens = harness.thought('a', 'b');
  harness.engine.script = function* () {
    yield sleep(90);
    yield { tokens: tokens.slice(0, 1) };
    yield sleep(90);
    yield { tokens: tokens.slice(1), finishReason: 'stop' };
  };
  const address = await harness.listen();
  const all = await text(await (await post(address, { ...QUESTION, stream: true })).response);
  const first = all.indexOf('data: ');
  assert.ok(all.slice(0, first).includes(': keep-alive\n\n'));
  assert.ok(all.slice(first).includes(': keep-alive\n\n'));
  assert.equal(eventsOf(all).at(-1), '[DONE]');
  await harness.close();
});

test('an error after the stream has begun is an event', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 20, stallMs: 10_000 } });
  harness.engine.script = function* () {
    yield sleep(60);
    yield { finishReason: 'error', error: { code: 'non_finite_logits', message: 'The logits are not finite.' } };
  };
  const { status, text: all } = await harness.chat({ ...QUESTION, stream: true });
  assert.equal(status, 200);
  assert.deepEqual(
    eventsOf(all).map((event) => event.error.code),
    ['non_finite_logits'],
  );
  await harness.close();
});

test('before the first token the comments say what a request is waiting for', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 40, stallMs: 60_000 } });
  const tokens = harness.thought('Hm.', '4');
  harness.engine.script = function* () {
    harness.engine.requestProgress = { status: 'waiting', numAhead: 2 };
    yield sleep(100);
    harness.engine.requestProgress = { status: 'prefill', numComputed: 512, numTokens: 4096 };
    yield sleep(1200);
    harness.engine.requestProgress = null;
    yield* oneByOne(tokens)({} as never);
  };
  const { text } = await harness.chat({ ...QUESTION, stream: true });
  assert.match(text, /^(: keep-alive, queued behind 2\n\n)+(: keep-alive, prefill 512\/4096\n\n)+id: .*\ndata: \{/);
  await harness.close();
});

test('a whole answer that takes long is kept alive by empty lines; an error then comes with status 200', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 40, stallMs: 60_000 } });
  const tokens = harness.thought('Hm.', '4');
  harness.engine.script = function* () {
    yield sleep(150);
    yield* oneByOne(tokens)({} as never);
  };
  const answer = await harness.chat(QUESTION);
  assert.match(answer.text, /^\n{2,}\{/);
  assert.equal(JSON.parse(answer.text).choices[0].message.content, '4');
  harness.engine.script = function* () {
    yield sleep(100);
    yield { finishReason: 'error', error: { code: 'engine_failed', message: 'It broke.' } };
  };
  const failed = await harness.chat(QUESTION);
  assert.equal(failed.status, 200);
  assert.equal(JSON.parse(failed.text).error.code, 'engine_failed');
  await harness.close();
});

test('a log keeps the latest events, up to a number of bytes', () => {
  const log = new EventLog(1000);
  for (let number = 0; number < 50; number++) log.add({ data: String(number).padEnd(100) });
  assert.equal(log.length, 50);
  assert.ok(log.numBytes <= 1000);
  const first = Array.from({ length: 50 }, (_, last) => last).find((last) => log.has(last))!;
  assert.ok(first >= 39 && first < 46, `what is behind event ${first} is kept`);
  const kept = log.after(first);
  assert.deepEqual(
    kept.map(([number, { data }]) => [number, Number(data)]),
    Array.from({ length: 49 - first }, (_, index) => [first + 1 + index, first + 1 + index]),
  );
  assert.deepEqual([log.has(49), log.has(50)], [true, false]);
  assert.deepEqual(log.after(49), []);
});

test('the writer says when its reader is behind and when it has caught up', async () => {
  const sse = new SseWriter({ heartbeatMs: 60_000, stallMs: 60_000 }, () => ': keep-alive\n\n');
  let numReady = 0;
  sse.onReady = () => numReady++;
  sse.write({ data: 'x'.repeat(100_000) });
  assert.equal(sse.isReady, false);
  sse.stream.resume();
  await until(() => sse.isReady, 'the reader');
  assert.equal(numReady, 1);
  sse.end();
  await until(() => sse.stream.destroyed, 'the end');
  sse.write({ data: 'ignored after the end' });
});

test('draining: what runs finishes, what comes is refused, health says so', async () => {
  const drain = new Drain();
  const harness = startHarness({ drain });
  const tokens = harness.thought('a b c', 'd e f');
  harness.engine.script = function* () {
    for (const [i, token] of tokens.entries()) {
      yield { tokens: [token], ...(i === tokens.length - 1 ? { finishReason: 'stop' } : {}) };
      yield sleep(15);
    }
  };
  const running = harness.chat({ ...QUESTION, stream: true });
  await until(() => harness.engine.numOpen === 1, 'submission');
  const drained = drain.begin(5000);
  const refused = await harness.chat(QUESTION);
  assert.deepEqual([refused.status, refused.body.error.code], [503, 'shutting_down']);
  assert.equal(refused.headers['retry-after'], '1');
  const health = await harness.app.inject({ url: '/health' });
  assert.deepEqual([health.statusCode, JSON.parse(health.body).status], [503, 'shutting_down']);
  assert.equal((await harness.app.inject({ url: '/health/live' })).statusCode, 200);
  await drained;
  assert.equal(eventsOf((await running).text).at(-1), '[DONE]');
  await harness.close();
});

test('draining does not wait longer than it was told', async () => {
  const drain = new Drain();
  const harness = startHarness({ drain });
  harness.engine.script = endless(harness, 5);
  const running = harness.chat({ ...QUESTION, stream: true });
  const whole = harness.chat(QUESTION);
  await until(() => harness.engine.numOpen === 2, 'submission');
  const before = performance.now();
  await drain.begin(50);
  assert.ok(performance.now() - before < 1500);
  assert.equal(eventsOf((await running).text).at(-1).error.code, 'shutting_down');
  assert.equal((await whole).status, 503);
  assert.equal(harness.engine.numOpen, 0);
  await harness.close();
});
