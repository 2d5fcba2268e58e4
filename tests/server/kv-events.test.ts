import assert from 'node:assert/strict';
import { connect } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { decode } from '@msgpack/msgpack';
import fc from 'fast-check';
import { Subscriber } from 'zeromq';
import type { CacheEvent } from '../../server/engine/cache-events.js';
import { EngineClient } from '../../server/engine/process.js';
import { readAddress } from '../../server/kv-events/address.js';
import { KvEvents } from '../../server/kv-events/kv-events.js';
import { encodeMsgpack, Float, type MsgpackValue } from '../../server/kv-events/msgpack.js';
import { Publisher } from '../../server/kv-events/publisher.js';
import { makeRequest } from '../helpers/fake-runner.js';

const hash = (index: number): string => `${'ab'.repeat(24)}${index.toString(16).padStart(16, '0')}`;

function stored(index: number, parent: number | null, tokenIds = [1, 2]): CacheEvent {
  const parentHash = parent === null ? null : hash(parent);
  return { kind: 'stored', hash: hash(index), parentHash, tokenIds: Int32Array.from(tokenIds) };
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const end = performance.now() + 5000;
  while (!condition()) {
    assert.ok(performance.now() < end, `waited 5 s for ${what}`);
    await sleep(2);
  }
}

/** A subscriber of libzmq, subscribed once the publisher knows it. */
async function subscribe(port: number, count: () => number, topic = ''): Promise<Subscriber> {
  const subscriber = new Subscriber({ receiveTimeout: 5000, linger: 0 });
  subscriber.connect(`tcp://127.0.0.1:${port}`);
  const before = count();
  subscriber.subscribe(topic);
  await until(() => count() > before, 'the subscription');
  return subscriber;
}

test('MessagePack is what another implementation reads', () => {
  const leaf = fc.oneof(
    fc.constant(null),
    fc.string({ unit: 'grapheme', maxLength: 300 }),
    fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
    fc.double({ noNaN: true }).map((value) => new Float(value)),
    fc.integer({ min: 0, max: 2 ** 32 - 1 }),
  );
  const { value } = fc.letrec<{ value: MsgpackValue }>((tie) => ({
    value: fc.oneof({ depthSize: 'small' }, leaf, fc.array(tie('value'))),
  }));
  /** What the other side should have: whole numbers as bigint where they need 64 bits. */
  const plain = (item: MsgpackValue): unknown => {
    if (item instanceof Float) return item.value;
    if (typeof item === 'bigint') return item < 1n << 32n ? Number(item) : item;
    return Array.isArray(item) ? item.map(plain) : item;
  };
  fc.assert(
    fc.property(value, (item) => {
      assert.deepEqual(decode(encodeMsgpack(item), { useBigInt64: true }), plain(item));
    }),
    { numRuns: 300 },
  );
  for (const length of [15, 16, 70_000]) {
    const list = Int32Array.from({ length }, (_, index) => index * 3);
    assert.deepEqual(decode(encodeMsgpack(list)), [...list]);
  }
  assert.throws(() => encodeMsgpack(-1), /unsigned/);
});

test('a ZeroMQ subscriber reads topic, sequence and events as vLLM writes them', async () => {
  const events = await KvEvents.listen({ host: '127.0.0.1', port: 0, topic: 'kv@here@m', blockSize: 2 });
  const subscriber = await subscribe(events.port, () => events.numSubscribers, 'kv@');
  try {
    events.publish([{ kind: 'cleared' }], 7);
    events.publish([stored(1, null), stored(2, 1, [3, 4]), stored(9, 5), { kind: 'removed', hash: hash(1) }], 1.5);
    const [topic, sequence, payload] = await subscriber.receive();
    assert.equal(topic!.toString(), 'kv@here@m');
    assert.deepEqual([...sequence!], [0, 0, 0, 0, 0, 0, 0, 0]);
    assert.equal(payload![1], 0xcb, 'the time is a float, though it is whole');
    assert.deepEqual(decode(payload!), [7, [['AllBlocksCleared']], 0]);
    const [, second, rest] = await subscriber.receive();
    assert.equal(second!.readBigUInt64BE(), 1n);
    assert.deepEqual(decode(rest!), [
      1.5,
      [
        ['BlockStored', [1, 2], null, [1, 2, 3, 4], 2, null, null, null],
        ['BlockStored', [9], 5, [1, 2], 2, null, null, null],
        ['BlockRemoved', [1], null],
      ],
      0,
    ]);
  } finally {
    subscriber.close();
    await events.close();
  }
});

test('each subscriber gets its topics, from its subscription on; large messages come whole', async () => {
  const publisher = await Publisher.listen('127.0.0.1', 0);
  const count = (): number => publisher.numSubscribers;
  const own = await subscribe(publisher.port, count, 'a');
  const all = await subscribe(publisher.port, count);
  try {
    const large = Buffer.alloc(300_000, 7);
    publisher.publish([Buffer.from('b'), Buffer.from('1')]);
    publisher.publish([Buffer.from('ab'), large]);
    assert.deepEqual((await own.receive())[1], large);
    assert.equal((await all.receive())[0]!.toString(), 'b');
    assert.deepEqual((await all.receive())[1], large);
    own.unsubscribe('a');
    await until(() => count() === 1, 'the end of the subscription');
    publisher.publish([Buffer.from('a'), Buffer.from('2')]);
    assert.equal((await all.receive())[1]!.toString(), '2');
    const late = await subscribe(publisher.port, count);
    publisher.publish([Buffer.from('c'), Buffer.from('3')]);
    assert.equal((await late.receive())[1]!.toString(), '3');
    late.close();
    await until(() => count() === 1, 'the subscriber to be gone');
  } finally {
    own.close();
    all.close();
    await publisher.close();
  }
});

test('a peer that speaks something else is sent away and disturbs nobody; one that does not read loses messages', async () => {
  const said: string[] = [];
  const publisher = await Publisher.listen('127.0.0.1', 0, (line) => said.push(line));
  const subscriber = await subscribe(publisher.port, () => publisher.numSubscribers);
  try {
    for (const bytes of ['GET / HTTP/1.1\r\n\r\n'.padEnd(64, ' '), Buffer.alloc(64, 255)]) {
      const peer = connect(publisher.port, '127.0.0.1');
      const closed = new Promise((resolve) => peer.once('close', resolve));
      peer.on('error', () => {});
      peer.resume();
      peer.write(bytes);
      await closed;
    }
    assert.equal(said.length, 2);
    const before = process.memoryUsage().arrayBuffers;
    const silent = connect(publisher.port, '127.0.0.1');
    silent.pause();
    const greeting = Buffer.alloc(64);
    greeting.write('\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL', 'latin1');
    silent.write(greeting);
    silent.write(Buffer.from('\x04\x06\x05READY\0\x01\x01', 'latin1'));
    await until(() => publisher.numSubscribers === 2, 'the silent subscriber');
    const part = Buffer.alloc(1 << 20);
    for (let index = 0; index < 100; index++) {
      publisher.publish([Buffer.of(index), part]);
      assert.equal((await subscriber.receive())[0]![0], index);
    }
    assert.ok(process.memoryUsage().arrayBuffers - before < 64 << 20, 'what nobody reads is not kept');
    silent.destroy();
  } finally {
    subscriber.close();
    await publisher.close();
  }
});

test('the engine process tells what it caches, and that all is lost when it dies', async () => {
  const heard: CacheEvent[] = [];
  const client = new EngineClient({
    entry: fileURLToPath(new URL('../helpers/fake-child.ts', import.meta.url)),
    config: {
      ...{ model: 'works', device: 'cpu', compute: 'auto', cpuPath: 'auto', numThreads: 1, blockSize: 4 },
      ...{ cacheMemory: null, maxModelLen: null, maxStepTokens: 32, maxNumSeqs: 16, maxQueue: 100 },
      ...{ speculativeTokens: 0, gpuMemoryUtilization: null, kvCacheDtype: 'auto', deterministic: false },
      hasCacheEvents: true,
    },
    onCacheEvents: (events) => heard.push(...events),
  });
  try {
    await client.ready();
    for await (const event of client.submit(makeRequest('a', [1, 2, 3, 4, 5, 6, 7, 8, 9], { maxTokens: 1 })))
      void event;
    const tokens = heard.map((event) => (event.kind === 'stored' ? [...event.tokenIds] : event.kind));
    assert.deepEqual(tokens, [
      [1, 2, 3, 4],
      [5, 6, 7, 8],
    ]);
    const [first, second] = heard as Extract<CacheEvent, { kind: 'stored' }>[];
    assert.equal(first!.parentHash, null);
    assert.equal(second!.parentHash, first!.hash);
    process.kill(client.pid!, 'SIGKILL');
    await until(() => heard.length === 3, 'the end of the engine process');
    assert.deepEqual(heard[2], { kind: 'cleared' });
  } finally {
    await client.close();
  }
});

test('addresses are read as ZeroMQ writes them', () => {
  assert.deepEqual(readAddress('tcp://*:5557'), { host: '0.0.0.0', port: 5557 });
  assert.deepEqual(readAddress('tcp://[::1]:1'), { host: '::1', port: 1 });
  assert.deepEqual(readAddress('tcp://localhost:65535'), { host: 'localhost', port: 65535 });
});
