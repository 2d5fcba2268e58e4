import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { decode } from '@msgpack/msgpack';
import { Subscriber } from 'zeromq';
import { Server, rodin } from './server.js';

const QUESTION = { messages: [{ role: 'user', content: 'What is 577 × 63?' }] };

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

test('a subscriber knows which prompts are cached, and that a new engine has cached none', async () => {
  const port = await freePort();
  const server = await Server.start(
    ...['--kv-events', `tcp://127.0.0.1:${port}`, '--kv-events-topic', 'kv@me@pocket-r1'],
    ...['--block-size', '16', '--speculative-tokens', '0'],
  );
  const subscriber = new Subscriber({ receiveTimeout: 10_000, linger: 0 });
  try {
    subscriber.connect(`tcp://127.0.0.1:${port}`);
    subscriber.subscribe('kv@');
    await sleep(500); // a ZeroMQ subscriber is not told when its subscription has arrived
    const { usage } = await server.json({ ...QUESTION, seed: 1, max_tokens: 80 });
    const stored: number[] = [];
    while (stored.length < 80) {
      const [topic, , payload] = await subscriber.receive();
      assert.equal(topic!.toString(), 'kv@me@pocket-r1');
      const [, events] = decode(payload!, { useBigInt64: true }) as [number, any[]];
      for (const [name, hashes, parent, tokens, blockSize] of events) {
        assert.equal(name, 'BlockStored');
        assert.equal(blockSize, 16);
        assert.equal(tokens.length, hashes.length * 16);
        assert.equal(parent === null, stored.length === 0);
        stored.push(...tokens);
      }
    }
    const tokenized = await fetch(`${server.url}/tokenize`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'pocket-r1', ...QUESTION }),
    });
    const { tokens: prompt } = (await tokenized.json()) as { tokens: number[] };
    assert.equal(prompt.length, usage.prompt_tokens);
    assert.deepEqual(stored.slice(0, prompt.length), prompt);
    process.kill(server.enginePid(), 'SIGKILL');
    const [, , payload] = await subscriber.receive();
    assert.deepEqual((decode(payload!) as any[])[1], [['AllBlocksCleared']]);
  } finally {
    subscriber.close();
    assert.equal(await server.stop(), 0);
  }
});

test('a collector gets the trace of a request, with its parts', async () => {
  const bodies: any[] = [];
  const collector = createServer((request, response) => {
    let text = '';
    request.on('data', (part: Buffer) => (text += part.toString()));
    request.on('end', () => {
      bodies.push({ url: request.url, ...JSON.parse(text) });
      response.end('{}');
    });
  });
  await new Promise<void>((resolve) => collector.listen(0, '127.0.0.1', resolve));
  const { port } = collector.address() as AddressInfo;
  const server = await Server.start('--otlp-traces-endpoint', `http://127.0.0.1:${port}/v1/traces`);
  try {
    const trace = '4bf92f3577b34da6a3ce929d0e0e4736';
    const response = await server.chat(QUESTION, {
      headers: { 'content-type': 'application/json', traceparent: `00-${trace}-00f067aa0ba902b7-01` },
    });
    assert.equal(response.status, 200);
    await response.text();
    assert.equal(await server.stop(), 0);
    assert.deepEqual(
      bodies.map(({ url }) => url),
      ['/v1/traces'],
    );
    const { spans } = bodies[0].resourceSpans[0].scopeSpans[0];
    assert.deepEqual(
      spans.map(({ name, traceId }: any) => [name, traceId]),
      ['chat pocket-r1', 'queue', 'prefill', 'decode'].map((name) => [name, trace]),
    );
    const [, queue, prefill, decoding] = spans.map((span: any) =>
      Number(BigInt(span.endTimeUnixNano) - BigInt(span.startTimeUnixNano)),
    );
    assert.ok(queue >= 0 && prefill > 0 && decoding > prefill, 'most of the time goes into the tokens');
    const completion = server.output.stderr.split('\n').find((line) => line.includes('"msg":"completion"'));
    assert.equal(JSON.parse(completion!).trace_id, trace);
  } finally {
    await server.stop();
    collector.closeAllConnections();
    collector.close();
  }
});

test('flags that cannot be used are refused', async () => {
  for (const [args, words] of [
    [['--kv-events', '5557'], /--kv-events must be an address to listen on, such as tcp:\/\/\*:5557/],
    [['--kv-events', 'tcp://*:70000'], /--kv-events must be/],
    [['--kv-events', 'tcp://192.0.2.1:5557'], /--kv-events tcp:\/\/192\.0\.2\.1:5557 cannot be listened on/],
    [['--otlp-traces-endpoint', 'localhost:4318'], /--otlp-traces-endpoint must be an http or https address/],
  ] as const) {
    const { code, stderr } = await rodin('serve', '--port', '0', ...args);
    assert.equal(code, 1);
    assert.match(stderr, words);
  }
});

test('rodin doctor says what is there, and what is not', async () => {
  const fine = await rodin('doctor');
  assert.equal(fine.code, 0, fine.stdout + fine.stderr);
  assert.match(fine.stdout, /CPU paths +(\w+, )*portable; the first is used/);
  assert.match(fine.stdout, /Rodin can serve here\./);
  const broken = await rodin('doctor', '--model', '/nowhere', '--device', 'cuda:99');
  assert.equal(broken.code, 1);
  assert.match(broken.stdout, /^! device .*cuda:99 cannot be used/m);
  assert.match(broken.stdout, /^! model +\/nowhere is no folder/m);
});
