import assert from 'node:assert/strict';
import { fork } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { EngineClient, type EngineClientOptions } from '../../server/engine/process.js';
import type { EngineEvent } from '../../server/engine/request.js';
import { expectedTokens, makeRequest } from '../helpers/fake-runner.js';

const ENTRY = fileURLToPath(new URL('../helpers/fake-child.ts', import.meta.url));
const PARENT = fileURLToPath(new URL('../helpers/engine-parent.ts', import.meta.url));

function makeClient(model: string, options: Partial<EngineClientOptions> = {}): EngineClient {
  const config = {
    model,
    device: 'cpu',
    compute: 'auto' as const,
    cpuPath: 'auto',
    numThreads: 1,
    blockSize: 4,
    cacheMemory: null,
    gpuMemoryUtilization: null,
    kvCacheDtype: 'auto' as const,
    deterministic: false,
    maxModelLen: null,
    maxStepTokens: 32,
    maxNumSeqs: 16,
    maxQueue: 100,
    speculativeTokens: 0,
  };
  return new EngineClient({ config, entry: ENTRY, ...options });
}

async function collect(stream: AsyncIterable<EngineEvent>): Promise<EngineEvent[]> {
  const events: EngineEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

function idsOf(events: EngineEvent[]): number[] {
  return events.flatMap((event) => event.tokens.map(({ id }) => id));
}

async function until(condition: () => boolean, what: string, limitMs = 10_000): Promise<void> {
  const end = performance.now() + limitMs;
  while (!condition()) {
    assert.ok(performance.now() < end, `waited ${limitMs} ms for ${what}`);
    await sleep(5);
  }
}

/** A process that ended but that nobody has waited for is not alive. */
function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return !existsSync('/proc/self') || !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return false;
  }
}

test('requests go to the engine process and come back as they would in this one', async () => {
  const client = makeClient('works');
  try {
    assert.equal(client.state().status, 'loading');
    assert.throws(() => client.submit(makeRequest('early', [1])), { code: 'model_loading' });
    await client.ready();
    assert.deepEqual(client.state(), {
      status: 'ready',
      device: 'fake',
      weightBytes: 1,
      cacheBytes: 2,
      maxContext: 256,
    });
    assert.equal(client.stats().numBlocks, 64);
    const requests = Array.from({ length: 64 }, (_, index) =>
      makeRequest(`r${index}`, [index, 3, 5], { maxTokens: 20, temperature: 1, seed: 2n ** 63n + BigInt(index) }),
    );
    const outputs = await Promise.all(requests.map(async (request) => idsOf(await collect(client.submit(request)))));
    for (const [index, request] of requests.entries()) {
      assert.deepEqual(outputs[index], expectedTokens(request, 97, 256));
    }
    await until(() => client.stats().numRunning === 0, 'idle stats');
    const stats = client.stats();
    assert.equal(stats.generationTokens, outputs.flat().length);
    assert.equal(stats.numFreeBlocks + stats.numCachedBlocks, stats.numBlocks);
    assert.throws(() => client.submit(makeRequest('bad', [97])), { code: 'token_out_of_vocabulary' });
    assert.throws(() => client.submit(makeRequest('long', new Array<number>(256).fill(1))), {
      code: 'context_length_exceeded',
    });
  } finally {
    await client.close();
  }
  assert.equal(client.state().status, 'closed');
  assert.throws(() => client.submit(makeRequest('late', [1])), { code: 'shutting_down' });
});

test('leaving a stream frees its blocks in the engine process', async () => {
  const client = makeClient('works');
  try {
    await client.ready();
    for await (const event of client.submit(makeRequest('r', [1, 2, 3], { maxTokens: 240 }))) {
      if (event.tokens.length > 0) break;
    }
    const aborted = client.submit(makeRequest('s', [1, 2, 3], { maxTokens: 240 }));
    client.abort('s');
    assert.equal((await collect(aborted)).at(-1)!.finishReason, 'abort');
    await until(() => client.stats().numSteps > 0 && client.stats().numRunning === 0, 'the abort to arrive');
    const { numFreeBlocks, numCachedBlocks, numBlocks } = client.stats();
    assert.equal(numFreeBlocks + numCachedBlocks, numBlocks);
  } finally {
    await client.close();
  }
});

test('kill -9: every stream ends with an error at once, and another process serves', async () => {
  const lines: string[] = [];
  const client = makeClient('works', { log: (line) => lines.push(line) });
  try {
    await client.ready();
    const firstPid = client.pid!;
    const streams = Array.from({ length: 32 }, (_, index) =>
      collect(client.submit(makeRequest(`r${index}`, [index], { maxTokens: 250 }))),
    );
    await sleep(20);
    const killedAt = performance.now();
    process.kill(firstPid, 'SIGKILL');
    for (const events of await Promise.all(streams)) {
      assert.equal(events.at(-1)!.finishReason, 'error');
      assert.equal(events.at(-1)!.error!.code, 'engine_failed');
    }
    assert.ok(performance.now() - killedAt < 1000);
    const state = client.state();
    assert.ok(state.status === 'restarting' && /SIGKILL/.test(state.reason), JSON.stringify(state));
    assert.throws(() => client.submit(makeRequest('early', [1])), { code: 'engine_restarting' });
    const { generationTokens } = client.stats();
    await until(() => client.state().status === 'ready', 'another engine');
    assert.ok(generationTokens > 0 && client.stats().generationTokens === generationTokens, 'counters go on counting');
    assert.notEqual(client.pid, firstPid);
    assert.equal(client.stats().numRestarts, 1);
    const request = makeRequest('again', [1, 2], { maxTokens: 5 });
    assert.deepEqual(idsOf(await collect(client.submit(request))), expectedTokens(request, 97, 256));
    assert.equal(lines.length, 2);
  } finally {
    await client.close();
  }
});

test('a start-up error is reported as it is, and nothing is started again', async () => {
  const client = makeClient('refused');
  try {
    await assert.rejects(client.ready(), {
      name: 'StartupError',
      message: 'model.safetensors: tensor "x" is missing.',
    });
    assert.deepEqual(client.state(), { status: 'failed', reason: 'model.safetensors: tensor "x" is missing.' });
    assert.throws(() => client.submit(makeRequest('r', [1])), { code: 'engine_failed' });
    assert.equal(client.pid, undefined);
  } finally {
    await client.close();
  }
});

test('a process that dies at every start is given up', async () => {
  const client = makeClient('crashes');
  try {
    await assert.rejects(client.ready(), /could not be started 3 times/);
    assert.equal(client.state().status, 'failed');
  } finally {
    await client.close();
  }
});

test('a runner that breaks ends its process, and another one is started', async () => {
  const client = makeClient('broken');
  try {
    await client.ready();
    const firstPid = client.pid;
    for (let index = 0; client.state().status === 'ready' && index < 10; index++) {
      const events = await collect(client.submit(makeRequest(`r${index}`, [1])));
      assert.equal(events.at(-1)!.error!.code, 'engine_failed');
      await sleep(20);
    }
    await until(() => client.state().status === 'ready' && client.pid !== firstPid, 'another engine');
  } finally {
    await client.close();
  }
});

test('an engine process that hangs is killed: silent, or without a step', async () => {
  for (const [model, options] of [
    ['hangs', { silenceMs: 1500 }],
    ['stalls', { stalledStepMs: 1500 }],
  ] as const) {
    const client = makeClient(model, options);
    try {
      await client.ready();
      const events = await collect(client.submit(makeRequest('r', [1], { maxTokens: 200 })));
      if (model === 'stalls') assert.equal(events.at(-1)!.error!.code, 'engine_failed');
      await until(() => client.state().status !== 'ready', `${model} to be noticed`);
    } finally {
      await client.close();
    }
  }
});

test('no orphan: the engine process ends when its parent is killed', async () => {
  const parent = fork(PARENT, [ENTRY], { execArgv: ['--import', import.meta.resolve('tsx')] });
  const pid = await new Promise<number>((resolve) => parent.once('message', (message) => resolve(message as number)));
  assert.ok(isAlive(pid));
  const exited = new Promise((resolve) => parent.once('exit', resolve));
  parent.kill('SIGKILL');
  await exited;
  await until(() => !isAlive(pid), 'the engine process to end', 2000);
});
