import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import { test } from 'node:test';
import { Engine } from '../../server/engine/engine.js';
import { PhaseTracker } from '../../server/engine/phase-tracker.js';
import type { EngineEvent } from '../../server/engine/request.js';
import { ApiError } from '../../server/errors.js';
import { FakeRunner, expectedTokens, makeRequest } from '../helpers/fake-runner.js';

const VOCAB_SIZE = 97;
const SETUP = { blockSize: 4, numBlocks: 64, maxStepTokens: 32, maxNumSeqs: 16 };
const MAX_CONTEXT = SETUP.blockSize * SETUP.numBlocks;

function makeEngine(
  overrides: Partial<typeof SETUP> = {},
  maxOpen = 128,
  launchAhead = true,
): { engine: Engine; runner: FakeRunner } {
  const setup = { ...SETUP, ...overrides };
  const runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
  const engine = new Engine(runner, {
    ...setup,
    fingerprint: 'fake',
    launchAhead,
    limits: { vocabSize: VOCAB_SIZE, maxContext: setup.blockSize * setup.numBlocks, maxOpen },
    info: { device: 'fake', weightBytes: 0, cacheBytes: 0 },
  });
  return { engine, runner };
}

/** Runs a test against its own engines, with and without steps ahead, and checks the block invariant behind it. */
async function withEngine(
  body: (engine: Engine, runner: FakeRunner) => Promise<void>,
  overrides: Partial<typeof SETUP> = {},
  maxOpen = 128,
): Promise<void> {
  for (const launchAhead of [false, true]) await withOneEngine(body, overrides, maxOpen, launchAhead);
}

async function withOneEngine(
  body: (engine: Engine, runner: FakeRunner) => Promise<void>,
  overrides: Partial<typeof SETUP>,
  maxOpen: number,
  launchAhead: boolean,
): Promise<void> {
  const { engine, runner } = makeEngine(overrides, maxOpen, launchAhead);
  try {
    await body(engine, runner);
    engine.checkInvariant();
    const stats = engine.stats();
    assert.equal(stats.numRunning + stats.numWaiting, 0);
    assert.equal(stats.numFreeBlocks + stats.numCachedBlocks, stats.numBlocks, 'nobody owns a block');
  } finally {
    await engine.close();
  }
}

async function collect(stream: AsyncIterable<EngineEvent>): Promise<EngineEvent[]> {
  const events: EngineEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

function idsOf(events: EngineEvent[]): number[] {
  return events.flatMap((event) => event.tokens.map(({ id }) => id));
}

function promptOf(index: number, length: number): number[] {
  return Array.from({ length }, (_, offset) => (index * 17 + offset * 5) % VOCAB_SIZE);
}

test('a request runs to its length, one event a token, the last with the finish reason', () =>
  withEngine(async (engine) => {
    const request = makeRequest('r', promptOf(1, 10), { maxTokens: 5, numLogprobs: 1 });
    const events = await collect(engine.submit(request));
    assert.deepEqual(idsOf(events), expectedTokens(request, VOCAB_SIZE, MAX_CONTEXT));
    assert.deepEqual(
      events.map(({ finishReason }) => finishReason),
      [undefined, undefined, undefined, undefined, 'length'],
    );
    const [token] = events[0]!.tokens;
    assert.deepEqual(token!.logprobs, { logprob: -token!.id / 8, top: [{ id: token!.id, logprob: -token!.id / 8 }] });
  }));

test('64 concurrent requests come out as each would alone', () =>
  withEngine(
    async (engine, runner) => {
      const requests = Array.from({ length: 64 }, (_, index) =>
        makeRequest(`r${index}`, promptOf(index, 1 + (index % 23)), {
          maxTokens: 1 + (index % 30),
          seed: BigInt(index),
        }),
      );
      const outputs = await Promise.all(requests.map(async (request) => idsOf(await collect(engine.submit(request)))));
      for (const [index, request] of requests.entries()) {
        assert.deepEqual(outputs[index], expectedTokens(request, VOCAB_SIZE, MAX_CONTEXT));
      }
      assert.equal(runner.maxSequences, SETUP.maxNumSeqs);
    },
    { numBlocks: 256 },
  ));

test('1,000 random aborts leave no block behind', () =>
  withEngine(async (engine) => {
    let random = 12345;
    const next = (below: number) => (random = (Math.imul(random, 1103515245) + 12345) >>> 0) % below;
    const readers: Promise<void>[] = [];
    let numAborted = 0;
    for (let index = 0; index < 1000; index++) {
      const id = `r${index}`;
      const request = makeRequest(id, promptOf(next(5), 1 + next(40)), { maxTokens: 60 });
      const numRead = next(6);
      const byLeaving = next(2) === 0;
      readers.push(
        (async () => {
          const stream = engine.submit(request);
          if (numRead === 0 && !byLeaving) engine.abort(id);
          let count = 0;
          for await (const event of stream) {
            if (event.finishReason === 'abort') numAborted++;
            if (++count < numRead) continue;
            if (byLeaving) {
              numAborted++;
              break;
            }
            engine.abort(id);
          }
        })(),
      );
      if (readers.length % 50 === 0) await Promise.all(readers.splice(0));
      else if (next(3) === 0) await sleep(0);
    }
    await Promise.all(readers);
    assert.equal(numAborted, 1000);
  }));

test('leaving the iteration aborts; aborting again, or an unknown request, does nothing', () =>
  withEngine(async (engine) => {
    for await (const event of engine.submit(makeRequest('r', promptOf(1, 8), { maxTokens: 200 }))) {
      assert.equal(event.finishReason, undefined);
      break;
    }
    engine.abort('r');
    engine.abort('unknown');
    assert.equal(engine.stats().numRunning, 0);
  }));

test('a consumer that does not read stalls nobody and loses nothing', () =>
  withEngine(async (engine) => {
    const slow = makeRequest('slow', promptOf(1, 8), { maxTokens: 50 });
    const stream = engine.submit(slow);
    await collect(engine.submit(makeRequest('other', promptOf(2, 8), { maxTokens: 80 })));
    assert.deepEqual(idsOf(await collect(stream)), expectedTokens(slow, VOCAB_SIZE, MAX_CONTEXT));
  }));

test('a request that the runner refuses fails alone', () =>
  withEngine(async (engine, runner) => {
    runner.throwOn = 96;
    const healthy = Array.from({ length: 4 }, (_, index) =>
      makeRequest(`r${index}`, promptOf(index, 6), { maxTokens: 20, logitBias: [[96, -Infinity]] }),
    );
    const outputs = healthy.map(async (request) => idsOf(await collect(engine.submit(request))));
    const events = await collect(engine.submit(makeRequest('poison', [1, 96, 2])));
    assert.equal(events.at(-1)!.finishReason, 'error');
    assert.equal(events.at(-1)!.error!.code, 'engine_failed');
    for (const [index, request] of healthy.entries()) {
      assert.deepEqual(await outputs[index], expectedTokens(request, VOCAB_SIZE, MAX_CONTEXT));
    }
  }));

test('a broken runner ends every stream, and the engine says so', async () => {
  const { engine, runner } = makeEngine();
  let reason = '';
  engine.onFailed = (text) => (reason = text);
  runner.isBroken = true;
  const streams = Array.from({ length: 5 }, (_, index) =>
    collect(engine.submit(makeRequest(`r${index}`, promptOf(index, 90), { maxTokens: 5 }))),
  );
  for (const events of await Promise.all(streams)) assert.equal(events.at(-1)!.error!.code, 'engine_failed');
  while (reason === '') {
    const events = await collect(engine.submit(makeRequest('one more', promptOf(1, 4))));
    assert.equal(events.at(-1)!.finishReason, 'error');
    await sleep(0);
  }
  assert.equal(engine.state().status, 'failed');
  assert.throws(() => engine.submit(makeRequest('late', [1])), { code: 'engine_failed' });
  engine.checkInvariant();
  await engine.close();
});

test('a lost device ends the engine with its first step: nothing is tried again', async () => {
  const { engine, runner } = makeEngine();
  let reason = '';
  engine.onFailed = (text) => (reason = text);
  runner.isLost = true;
  const stream = collect(engine.submit(makeRequest('r', promptOf(1, 9), { maxTokens: 5 })));
  assert.match((await stream).at(-1)!.error!.message, /the fake device is lost/);
  assert.match(reason, /the fake device is lost/);
  assert.equal(engine.state().status, 'failed');
  await engine.close();
});

test('closing ends open streams with an error and refuses new requests', async () => {
  const { engine } = makeEngine();
  const events = collect(engine.submit(makeRequest('r', promptOf(1, 8), { maxTokens: 200 })));
  await sleep(5);
  await engine.close();
  await engine.close();
  assert.equal((await events).at(-1)!.error!.code, 'shutting_down');
  assert.throws(() => engine.submit(makeRequest('late', [1])), { code: 'shutting_down' });
});

test('bad requests are refused with the parameter, and disturb nobody', () =>
  withEngine(async (engine) => {
    const neighbour = makeRequest('neighbour', promptOf(3, 8), { maxTokens: 30 });
    const output = collect(engine.submit(neighbour));
    const cases: [string, string | null, Parameters<typeof makeRequest>[1], Parameters<typeof makeRequest>[2]][] = [
      ['invalid_value', 'messages', [], {}],
      ['context_length_exceeded', 'messages', promptOf(1, MAX_CONTEXT), {}],
      ...[-1, VOCAB_SIZE, 1.5, NaN, -(2 ** 31), 2 ** 31, 2 ** 53].flatMap((id): typeof cases => [
        ['token_out_of_vocabulary', 'messages', [id], {}],
        ['token_out_of_vocabulary', 'logit_bias', [1], { logitBias: [[id, 1]] }],
        ['token_out_of_vocabulary', 'stop_token_ids', [1], { stopTokenIds: [id], minTokens: 1 }],
      ]),
      ['invalid_value', 'logit_bias', [1], { logitBias: [[1, NaN]] }],
      ['invalid_value', 'temperature', [1], { temperature: NaN }],
      ['invalid_value', 'temperature', [1], { temperature: -0.5 }],
      ['invalid_value', 'top_p', [1], { topP: 0 }],
      ['invalid_value', 'top_p', [1], { topP: 1.01 }],
      ['invalid_value', 'top_k', [1], { topK: -1 }],
      ['invalid_value', 'min_p', [1], { minP: 2 }],
      ['invalid_value', 'seed', [1], { seed: 2n ** 64n }],
      ['invalid_value', 'presence_penalty', [1], { presencePenalty: 3 }],
      ['invalid_value', 'frequency_penalty', [1], { frequencyPenalty: -3 }],
      ['invalid_value', 'repetition_penalty', [1], { repetitionPenalty: 0 }],
      ['invalid_value', 'max_tokens', [1], { maxTokens: 0 }],
      ['invalid_value', 'min_tokens', [1], { minTokens: 9, maxTokens: 8 }],
      ['invalid_value', 'top_logprobs', [1], { numLogprobs: VOCAB_SIZE + 1 }],
    ];
    for (const [code, param, promptIds, sampling] of cases) {
      const submit = () => engine.submit(makeRequest('bad', promptIds, sampling));
      assert.throws(submit, (error) => error instanceof ApiError && error.code === code && error.param === param);
    }
    assert.deepEqual(idsOf(await output), expectedTokens(neighbour, VOCAB_SIZE, MAX_CONTEXT));
  }));

test('the queue has a limit', () =>
  withEngine(
    async (engine) => {
      const streams = [1, 2, 3].map((index) => collect(engine.submit(makeRequest(`r${index}`, promptOf(index, 4)))));
      assert.throws(() => engine.submit(makeRequest('r4', [1])), { code: 'queue_full' });
      await Promise.all(streams);
    },
    { maxNumSeqs: 1 },
    3,
  ));

test('a sequence ends where the context ends', () =>
  withEngine(
    async (engine) => {
      const events = await collect(engine.submit(makeRequest('r', promptOf(1, 10), { maxTokens: 100 })));
      assert.equal(idsOf(events).length, 6);
      assert.equal(events.at(-1)!.finishReason, 'length');
    },
    { numBlocks: 4 },
  ));

test('phases are labelled from token ids', () => {
  const markers = { thinkStart: 1, thinkEnd: 2, toolCallsBegin: 3, toolCallsEnd: 4 };
  const label = (startPhase: 'reasoning' | 'answer', ids: number[]) => {
    const tracker = new PhaseTracker(markers, startPhase);
    return ids.map((id) => tracker.label(id, id === 0).charAt(0)).join('');
  };
  assert.equal(label('reasoning', [9, 9, 2, 9, 9, 0]), 'rrcaac');
  assert.equal(label('answer', [9, 1, 9, 2, 9]), 'acrca');
  assert.equal(label('answer', [9, 3, 9, 2, 1, 9, 4, 9, 0]), 'acttttcac');
  assert.equal(label('reasoning', [9, 3, 9, 0]), 'rctc');
  assert.equal(label('reasoning', [9, 3, 9, 4, 9, 2, 9]), 'rctcrca');
  const none = new PhaseTracker({ thinkStart: -1, thinkEnd: -1, toolCallsBegin: -1, toolCallsEnd: -1 }, 'answer');
  assert.equal(none.label(2, false), 'answer');
});
