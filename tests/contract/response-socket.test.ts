import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Drain } from '../../server/api/drain.js';
import { ApiError } from '../../server/errors.js';
import { Frames } from '../helpers/frames.js';
import { startHarness, type Harness } from './harness.js';
import { checkErrorFrame, checkEvents } from './response-check.js';

const INPUT = { input: 'What is 2 + 2?' };

type Options = Parameters<typeof startHarness>[0];

async function withSocket(
  options: Options,
  job: (client: Frames, harness: Harness, url: string) => Promise<void>,
): Promise<void> {
  const harness = startHarness(options);
  const url = await harness.listen();
  const client = await Frames.open(url);
  try {
    await job(client, harness, url);
  } finally {
    client.socket.terminate();
    await harness.close();
  }
}

async function refusal(client: Frames, frame: string | object): Promise<any> {
  client.socket.send(typeof frame === 'string' ? frame : JSON.stringify(frame));
  const answer = await client.error();
  checkErrorFrame(answer);
  return answer;
}

test('a response over a WebSocket has the events of a stream', () =>
  withSocket({}, async (client, harness) => {
    client.create({ ...INPUT, stream: true, seed: 7 });
    const last = await client.ended();
    assert.deepEqual(checkEvents(client.all), last);
    assert.equal(last.output[1].content[0].text, 'It is 4.');
    const stored = await harness.app.inject({ url: `/v1/responses/${last.id}` });
    assert.deepEqual(stored.json(), last);
    await client.close();
  }));

test('lanes run side by side, requests of one lane in their order', () =>
  withSocket({}, async (client, harness) => {
    const goes: (() => void)[] = [];
    harness.engine.script = function* () {
      yield { tokens: harness.tokens('Hm', 'reasoning') };
      yield new Promise<void>((resolve) => goes.push(resolve));
      yield { tokens: harness.thought('so', 'x'), finishReason: 'stop' };
    };
    client.create({ ...INPUT, stream_id: 'a' });
    client.create({ ...INPUT, stream_id: 'b' });
    client.create({ ...INPUT, stream_id: 'a' });
    client.create({ ...INPUT });
    while (goes.length < 3) await sleep(5);
    await sleep(20);
    assert.equal(harness.engine.requests.length, 3);
    goes[1]!();
    await client.ended('b');
    assert.equal(client.of('a').filter(({ type }) => type === 'response.completed').length, 0);
    goes[0]!();
    await client.ended('a');
    while (goes.length < 4) await sleep(5);
    goes[2]!();
    goes[3]!();
    await client.ended('a', 2);
    await client.ended(undefined);
    const first = client.of('a').findIndex(({ type }) => type === 'response.completed') + 1;
    checkEvents(client.of('a').slice(0, first));
    checkEvents(client.of('a').slice(first));
    checkEvents(client.of('b'));
    checkEvents(client.of(undefined));
  }));

test('a response that is not stored can be gone on with on its connection alone', () =>
  withSocket({}, async (client, harness, url) => {
    client.create({ ...INPUT, store: false });
    const { id } = await client.ended();
    client.create({ input: 'And 3 + 3?', store: false, previous_response_id: id, stream_id: 'fork' });
    await client.ended('fork');
    const [first, second] = harness.engine.requests.map(({ promptIds }) => promptIds.length);
    assert.ok(second! > first!);
    const other = await Frames.open(url);
    other.create({ input: 'And?', previous_response_id: id });
    const { error, status } = await other.error();
    assert.deepEqual([status, error.code, error.param], [400, 'previous_response_not_found', 'previous_response_id']);
    await other.close();
  }));

test('a prompt computed ahead: nothing is generated, and the next request goes on with it', () =>
  withSocket({}, async (client, harness) => {
    harness.engine.script = function* ({ prefillOnly }) {
      if (prefillOnly) yield { finishReason: 'stop' };
      else yield { tokens: harness.thought('a', 'b'), finishReason: 'stop' };
    };
    client.create({ ...INPUT, generate: false, store: false, instructions: 'Be short.' });
    const ahead = await client.ended();
    checkEvents(client.all);
    assert.deepEqual([ahead.status, ahead.output, ahead.usage.output_tokens], ['completed', [], 0]);
    client.create({ instructions: 'Be short.', previous_response_id: ahead.id });
    await client.ended(undefined, 2);
    const [first, second] = harness.engine.requests;
    assert.deepEqual([first!.prefillOnly, second!.prefillOnly], [true, undefined]);
    assert.deepEqual(second!.promptIds.slice(0, first!.promptIds.length), first!.promptIds);
    assert.ok(second!.promptIds.length > first!.promptIds.length);
    client.create({ instructions: 'You are terse.', generate: false });
    await client.ended(undefined, 3);
  }));

test('frames that cannot be answered get an error frame, and the connection lives on', () =>
  withSocket({ args: ['--max-body-size', '4000B', '--max-lanes', '2'] }, async (client, harness) => {
    const create = { type: 'response.create', model: 'pocket-r1', ...INPUT };
    const rows: [string | object, string, string | null, number][] = [
      ['{', 'invalid_json', null, 400],
      ['[]', 'invalid_type', null, 400],
      [{}, 'invalid_value', 'type', 400],
      [{ type: 'session.update' }, 'invalid_value', 'type', 400],
      [{ ...create, stream_id: 'a b' }, 'invalid_value', 'stream_id', 400],
      [{ ...create, stream_id: 7 }, 'invalid_type', 'stream_id', 400],
      [{ ...create, generate: 'no' }, 'invalid_type', 'generate', 400],
      [{ ...create, background: true }, 'unsupported_value', 'background', 400],
      [{ ...create, stream: false }, 'unsupported_value', 'stream', 400],
      [{ ...create, temperature: 5 }, 'invalid_value', 'temperature', 400],
      [{ ...create, n: 2 }, 'unsupported_value', 'n', 400],
      [{ ...create, model: 'x' }, 'model_not_found', 'model', 404],
      [{ ...create, model: undefined }, 'missing_required_parameter', 'model', 400],
      [{ ...create, input: undefined }, 'missing_required_parameter', 'input', 400],
      [{ ...create, input: 'x'.repeat(5000) }, 'request_too_large', null, 413],
      [{ type: 'response.control', action: 'stop' }, 'invalid_value', 'action', 400],
      [{ type: 'response.control', action: 'cancel' }, 'not_found', 'stream_id', 404],
      [{ type: 'response.control', action: 'cancel', response_id: 'resp_x' }, 'not_found', 'response_id', 404],
    ];
    for (const [frame, code, param, status] of rows) {
      const answer = await refusal(client, frame);
      assert.deepEqual(
        [answer.error.code, answer.error.param, answer.status],
        [code, param, status],
        answer.error.message,
      );
    }
    const named = await refusal(client, { ...create, stream_id: 'a', temperature: 5 });
    assert.equal(named.stream_id, 'a');
    client.socket.send(Buffer.from(JSON.stringify(create)));
    assert.equal((await client.error()).error.code, 'invalid_json');
    assert.equal(harness.engine.requests.length, 0);

    harness.engine.script = function* () {
      yield { tokens: harness.tokens('Hm', 'reasoning') };
      yield new Promise<void>(() => {});
    };
    client.create({ ...INPUT, stream_id: 'a' });
    client.create({ ...INPUT, stream_id: 'b' });
    const full = await refusal(client, { ...create, stream_id: 'c' });
    assert.deepEqual([full.error.code, full.error.param], ['websocket_stream_limit_reached', 'stream_id']);
    for (let i = 0; i < 64; i++) client.create({ ...INPUT, stream_id: 'a' });
    const crowded = await refusal(client, { ...create, stream_id: 'a' });
    assert.deepEqual([crowded.error.code, crowded.status], ['queue_full', 429]);

    harness.engine.submitError = new ApiError('model_loading', 'The model is loading.');
    await refusal(client, { type: 'response.control', action: 'end_thinking', stream_id: 'c' });
    client.send({ type: 'response.control', action: 'cancel', stream_id: 'b' });
    assert.equal((await client.ended('b')).status, 'cancelled');
    checkEvents(client.of('b'));
    const loading = await refusal(client, { ...create, stream_id: 'b' });
    assert.deepEqual([loading.error.code, loading.status], ['model_loading', 503]);
  }));

test('a lane whose response fails goes on, and harms no other', () =>
  withSocket({}, async (client, harness) => {
    let num = 0;
    harness.engine.script = function* () {
      yield { tokens: harness.tokens('Hm', 'reasoning') };
      if (num++ === 0) yield { finishReason: 'error', error: { code: 'engine_failed', message: 'The engine died.' } };
      else yield { tokens: harness.thought('so', 'x'), finishReason: 'stop' };
    };
    for (const lane of ['a', 'b', 'a']) client.create({ ...INPUT, stream_id: lane });
    const failed = await client.ended('a');
    assert.deepEqual([failed.status, failed.error.message], ['failed', 'The engine died.']);
    assert.equal((await client.ended('a', 2)).status, 'completed');
    assert.equal((await client.ended('b')).status, 'completed');
    checkEvents(client.of('b'));
  }));

test('requests that wait may take so many bytes together', () =>
  withSocket({ args: ['--max-body-size', '4000B'] }, async (client, harness) => {
    harness.engine.script = function* () {
      yield new Promise<void>(() => {});
    };
    const big = {
      ...INPUT,
      metadata: Object.fromEntries(Array.from({ length: 7 }, (_, i) => [`${i}`, 'x'.repeat(500)])),
    };
    for (let i = 0; i < 6; i++) client.create({ ...big, stream_id: 'a' });
    const { error, status } = await client.error();
    assert.deepEqual([status, error.code, error.param], [429, 'queue_full', null]);
    client.create({ ...INPUT, stream_id: 'b' });
    await client.until(({ stream_id, type }) => stream_id === 'b' && type === 'response.in_progress');
    assert.deepEqual(harness.engine.requests.length, 2);
  }));

test('a frame far beyond the limit closes the connection', () =>
  withSocket({ args: ['--max-body-size', '2000B'] }, async (client) => {
    client.create({ input: 'x'.repeat(5000) });
    assert.equal((await client.closed).code, 1009);
  }));

test('closing a socket ends all that runs and waits on it', () =>
  withSocket({}, async (client, harness) => {
    harness.engine.script = function* () {
      yield { tokens: harness.tokens('Hm', 'reasoning') };
      yield new Promise<void>(() => {});
    };
    for (const lane of ['a', 'b', 'c']) for (let i = 0; i < 3; i++) client.create({ ...INPUT, stream_id: lane });
    while (harness.engine.requests.length < 3) await sleep(5);
    client.socket.terminate();
    for (let i = 0; harness.engine.aborted.length < 3; i++) {
      assert.ok(i < 50, 'what ran on the socket goes on');
      await sleep(5);
    }
    await sleep(20);
    assert.equal(harness.engine.requests.length, 3);
  }));

test('more sockets than allowed, idle ones and those of strangers are refused', async () => {
  const harness = startHarness({ args: ['--max-sockets', '1', '--socket-idle', '1', '--api-key', 'secret'] });
  const url = await harness.listen();
  const headers = { authorization: 'Bearer secret' };
  assert.equal(await Frames.refused(url), 401);
  assert.equal(await Frames.refused(url, { ...headers, origin: 'https://evil.example' }), 403);
  const first = await Frames.open(url, { ...headers, origin: url });
  const second = await Frames.open(url, headers);
  const refused = await second.error();
  checkErrorFrame(refused);
  assert.equal(refused.error.code, 'websocket_connection_limit_reached');
  assert.equal((await second.closed).code, 1013);
  const idle = await first.error();
  checkErrorFrame(idle);
  assert.equal(idle.error.code, 'websocket_connection_limit_reached');
  assert.equal((await first.closed).code, 1001);
  const third = await Frames.open(url, headers);
  const metrics = await (await fetch(`${url}/metrics`, { headers })).text();
  assert.match(metrics, /^rodin:websockets\{.*\} 1$/m);
  await third.close();
  const plain = await fetch(`${url}/v1/responses`, { headers });
  assert.deepEqual([plain.status, plain.headers.get('upgrade')], [426, 'websocket']);
  assert.equal(((await plain.json()) as any).error.code, 'upgrade_required');
  await harness.close();
});

test('a client that does not read holds nothing up: deltas are merged, and it is cut off in the end', async () => {
  const harness = startHarness({ sse: { heartbeatMs: 1000, stallMs: 300 } });
  const url = await harness.listen();
  const word = harness.tokens('many words ', 'reasoning');
  let numSteps = 0;
  harness.engine.script = function* () {
    for (; numSteps < 200_000; numSteps++) {
      if (numSteps % 500 === 0) yield new Promise<void>((resolve) => setImmediate(resolve));
      yield { tokens: word };
    }
    yield { tokens: harness.thought('', 'x'), finishReason: 'stop' };
  };
  const client = await Frames.open(url);
  client.socket._socket.pause();
  client.create(INPUT);
  const before = process.memoryUsage().arrayBuffers;
  for (let i = 0; harness.engine.aborted.length === 0; i++) {
    assert.ok(i < 400, 'the client is not cut off');
    await sleep(10);
  }
  assert.ok(process.memoryUsage().arrayBuffers - before < 32 * 2 ** 20);
  client.socket._socket.resume();
  assert.equal((await client.closed).code, 1006);
  await harness.close();
});

test('a server that shuts down lets responses end, takes none, and says goodbye', async () => {
  const drain = new Drain();
  const harness = startHarness({ drain });
  const url = await harness.listen();
  let go = (): void => {};
  harness.engine.script = function* () {
    yield { tokens: harness.tokens('Hm', 'reasoning') };
    yield new Promise<void>((resolve) => (go = resolve));
    yield { tokens: harness.thought('so', 'x'), finishReason: 'stop' };
  };
  const client = await Frames.open(url);
  client.create({ ...INPUT, stream_id: 'a' });
  await client.until(({ type }) => type === 'response.in_progress');
  const drained = drain.begin(1000);
  client.create({ ...INPUT, stream_id: 'b' });
  assert.equal((await client.error()).error.code, 'shutting_down');
  await sleep(20);
  go();
  await drained;
  assert.equal((await client.ended('a')).status, 'completed');
  await harness.close();
  assert.equal((await client.closed).code, 1001);
});
