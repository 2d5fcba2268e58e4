import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { BlockPool } from '../../server/engine/block-pool.js';
import { packStep, unpackStep } from '../../server/engine/pack-step.js';
import { PrefixCache } from '../../server/engine/prefix-cache.js';
import type { EngineEvent, EngineRequest } from '../../server/engine/request.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { FakeRunner, expectedTokens, makeRequest } from '../helpers/fake-runner.js';

const VOCAB_SIZE = 97;

interface Setup {
  blockSize: number;
  numBlocks: number;
  maxStepTokens: number;
  maxNumSeqs: number;
  maxOpen: number;
}

type Command =
  | {
      kind: 'submit';
      prompt: { family: number; length: number };
      salt: string;
      sampling: Partial<EngineRequest['sampling']>;
    }
  | { kind: 'abort'; which: number }
  /** abortDuring: a sequence that is aborted while the step runs; -1 for none */
  | { kind: 'step'; abortDuring: number };

/** One scheduler with a fake runner, driven synchronously; checks the invariants after each command. */
class Rig {
  readonly setup: Setup;
  readonly scheduler: Scheduler;
  readonly runner: FakeRunner;
  readonly maxContext: number;
  readonly requests = new Map<string, EngineRequest>();
  readonly tokens = new Map<string, number[]>();
  readonly terminal = new Map<string, EngineEvent>();
  readonly trace: string[] = [];

  constructor(setup: Setup) {
    this.setup = setup;
    this.maxContext = setup.numBlocks * setup.blockSize;
    this.scheduler = new Scheduler({
      ...setup,
      fingerprint: 'fake',
      limits: { vocabSize: VOCAB_SIZE, maxContext: this.maxContext, maxOpen: setup.maxOpen },
    });
    this.runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
  }

  submit(request: EngineRequest): void {
    try {
      this.scheduler.add(request);
    } catch (error) {
      this.trace.push(`refused ${request.requestId} ${(error as Error).message}`);
      assert.match((error as { code: string }).code, /^(queue_full|context_length_exceeded)$/);
      if ((error as { code: string }).code === 'queue_full') assert.ok(this.open().length >= this.setup.maxOpen);
      return;
    }
    this.requests.set(request.requestId, request);
    this.tokens.set(request.requestId, []);
    assert.ok(this.open().length <= this.setup.maxOpen);
  }

  open(): string[] {
    return [...this.requests.keys()].filter((id) => !this.terminal.has(id));
  }

  abort(requestId: string): void {
    const event = this.scheduler.end(requestId, 'abort');
    if (event !== null) this.take([event]);
    this.scheduler.checkInvariant();
  }

  /** One of all requests so far, finished ones included. */
  abortOne(which: number): void {
    const ids = [...this.requests.keys()];
    this.abort(ids[which % Math.max(1, ids.length)] ?? 'unknown');
  }

  step(abortDuring = -1): boolean {
    const plan = this.scheduler.schedule();
    if (plan === null) return false;
    const numTokens = plan.sequences.reduce((sum, { count }) => sum + count, 0);
    assert.ok(numTokens <= this.setup.maxStepTokens);
    assert.ok(plan.sequences.length <= this.setup.maxNumSeqs);
    this.scheduler.checkInvariant();
    const result = this.runner.stepNow(packStep(plan, this.setup.blockSize));
    if (abortDuring >= 0) this.abortOne(abortDuring);
    this.take(this.scheduler.commit(plan, unpackStep(plan, result, VOCAB_SIZE)));
    this.scheduler.checkInvariant();
    return true;
  }

  take(events: EngineEvent[]): void {
    for (const event of events) {
      const { requestId } = event;
      this.trace.push(JSON.stringify(event));
      assert.ok(!this.terminal.has(requestId), 'nothing comes after the terminal event');
      const tokens = this.tokens.get(requestId)!;
      tokens.push(...event.tokens.map(({ id }) => id));
      assert.ok(tokens.length <= this.requests.get(requestId)!.sampling.maxTokens);
      this.checkCached(event);
      if (event.finishReason !== undefined) this.terminal.set(requestId, event);
    }
  }

  /** Cached tokens were computed before for a sequence with the same salt and the same prefix. */
  checkCached({ requestId, cachedTokens }: EngineEvent): void {
    const request = this.requests.get(requestId)!;
    assert.ok(cachedTokens <= request.promptIds.length && cachedTokens % this.setup.blockSize === 0);
    if (cachedTokens === 0) return;
    const isKnown = [...this.requests.values()].some((other) => {
      if (other === request || other.cacheSalt !== request.cacheSalt) return false;
      const all = [...other.promptIds, ...this.tokens.get(other.requestId)!];
      return request.promptIds.slice(0, cachedTokens).every((id, index) => id === all[index]);
    });
    assert.ok(isKnown, `${cachedTokens} cached tokens that nobody computed`);
  }

  drain(): void {
    let numSteps = 0;
    while (this.step()) assert.ok(++numSteps < 100_000, 'every request ends');
    const stats = this.scheduler.stats();
    assert.equal(stats.numFreeBlocks + stats.numCachedBlocks, stats.numBlocks, 'nothing is owned any more');
    for (const [id, request] of this.requests) {
      const event = this.terminal.get(id);
      assert.ok(event, `${id} has a terminal event`);
      const expected = expectedTokens(request, VOCAB_SIZE, this.maxContext);
      const tokens = this.tokens.get(id)!;
      if (event.finishReason === 'abort') assert.deepEqual(tokens, expected.slice(0, tokens.length));
      else {
        assert.deepEqual(tokens, expected);
        const isStop = request.sampling.stopTokenIds.includes(tokens.at(-1)!);
        assert.equal(event.finishReason, isStop ? 'stop' : 'length');
        assert.equal(event.stopTokenId, isStop ? tokens.at(-1) : undefined);
      }
    }
  }
}

/** Prompts of one family are prefixes of one another, so that the prefix cache has something to do. */
function promptOf(family: number, length: number): number[] {
  return Array.from({ length }, (_, index) => (family * 31 + index * 7 + ((index * index) % 5)) % VOCAB_SIZE);
}

const setups: fc.Arbitrary<Setup> = fc
  .record({
    blockSize: fc.constantFrom(1, 2, 4, 8),
    numBlocks: fc.integer({ min: 12, max: 40 }),
    maxNumSeqs: fc.integer({ min: 1, max: 12 }),
    extraTokens: fc.integer({ min: 0, max: 40 }),
    extraOpen: fc.integer({ min: 0, max: 8 }),
  })
  .map(({ extraTokens, extraOpen, ...setup }) => ({
    ...setup,
    maxStepTokens: setup.maxNumSeqs + extraTokens,
    maxOpen: setup.maxNumSeqs + extraOpen,
  }));

const commands: fc.Arbitrary<Command[]> = fc.array(
  fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        kind: fc.constant('submit' as const),
        prompt: fc.record({ family: fc.integer({ min: 0, max: 2 }), length: fc.integer({ min: 1, max: 30 }) }),
        salt: fc.constantFrom('', 'tenant'),
        sampling: fc
          .record({
            maxTokens: fc.integer({ min: 1, max: 60 }),
            minTokens: fc.integer({ min: 0, max: 6 }),
            temperature: fc.constantFrom(0, 1),
            seed: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
            stopTokenIds: fc.uniqueArray(fc.integer({ min: 0, max: VOCAB_SIZE - 1 }), { maxLength: 2 }),
            frequencyPenalty: fc.constantFrom(0, 0, 1),
          })
          .map((sampling) => ({ ...sampling, minTokens: Math.min(sampling.minTokens, sampling.maxTokens) })),
      }),
    },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('abort' as const), which: fc.nat(1000) }) },
    {
      weight: 8,
      arbitrary: fc.record({
        kind: fc.constant('step' as const),
        abortDuring: fc.oneof({ weight: 9, arbitrary: fc.constant(-1) }, { weight: 1, arbitrary: fc.nat(1000) }),
      }),
    },
  ),
  { minLength: 10, maxLength: 150, size: 'max' },
);

function play(setup: Setup, script: Command[]): Rig {
  const rig = new Rig(setup);
  for (const [index, command] of script.entries()) {
    if (command.kind === 'step') rig.step(command.abortDuring);
    else if (command.kind === 'submit') {
      const { family, length } = command.prompt;
      const request = makeRequest(`r${index}`, promptOf(family, length), command.sampling, { cacheSalt: command.salt });
      rig.submit(request);
    } else rig.abortOne(command.which);
  }
  rig.drain();
  return rig;
}

test('any commands: outputs are those of each request alone, the invariants hold, the trace is replayable', () => {
  let numPreemptions = 0;
  let numHits = 0;
  fc.assert(
    fc.property(setups, commands, (setup, script) => {
      const rig = play(setup, script);
      assert.deepEqual(play(setup, script).trace, rig.trace);
      numPreemptions += rig.scheduler.stats().numPreemptions;
      numHits += rig.scheduler.stats().prefixCacheHits;
    }),
    { numRuns: 300 },
  );
  assert.ok(numPreemptions > 50, `the runs preempt: ${numPreemptions}`);
  assert.ok(numHits > 500, `the runs hit the prefix cache: ${numHits}`);
});

test('a pool of a tenth of the demand preempts often and changes no token', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 24, maxStepTokens: 32, maxNumSeqs: 16, maxOpen: 64 });
  for (let index = 0; index < 40; index++) {
    rig.submit(
      makeRequest(`r${index}`, promptOf(index, 12 + (index % 9)), { maxTokens: 40 }, { cacheSalt: `${index}` }),
    );
  }
  rig.drain();
  const { numPreemptions } = rig.scheduler.stats();
  assert.ok(numPreemptions >= 10 && numPreemptions <= 5 * 40, `${numPreemptions} preemptions of 40 requests`);
});

test('a prompt that is wholly in the prefix cache computes one token and writes no shared block', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 32, maxStepTokens: 64, maxNumSeqs: 4, maxOpen: 8 });
  const prompt = promptOf(1, 16);
  rig.submit(makeRequest('first', prompt));
  rig.drain();
  rig.submit(makeRequest('second', prompt));
  const plan = rig.scheduler.schedule()!;
  const batch = packStep(plan, 4);
  assert.deepEqual([...batch.positions], [15]);
  assert.deepEqual([...batch.slotMapping], [-1]);
  rig.take(rig.scheduler.commit(plan, unpackStep(plan, rig.runner.stepNow(batch), VOCAB_SIZE)));
  rig.drain();
  assert.equal(rig.terminal.get('second')!.cachedTokens, 16);
  assert.deepEqual(rig.tokens.get('second'), rig.tokens.get('first'));
});

test('another salt shares nothing', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 32, maxStepTokens: 64, maxNumSeqs: 4, maxOpen: 8 });
  rig.submit(makeRequest('first', promptOf(1, 16), {}, { cacheSalt: 'a' }));
  rig.drain();
  rig.submit(makeRequest('second', promptOf(1, 16), {}, { cacheSalt: 'b' }));
  rig.drain();
  assert.equal(rig.terminal.get('second')!.cachedTokens, 0);
});

test('a non-finite row fails its sequence, and its blocks are not published', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 32, maxStepTokens: 8, maxNumSeqs: 4, maxOpen: 8 });
  const prompt = promptOf(2, 16);
  rig.runner.isPoisoned = true;
  rig.submit(makeRequest('poisoned', prompt));
  while (rig.step());
  assert.equal(rig.terminal.get('poisoned')!.error!.code, 'non_finite_logits');
  rig.runner.isPoisoned = false;
  rig.submit(makeRequest('healthy', prompt));
  while (rig.step());
  assert.equal(rig.terminal.get('healthy')!.finishReason, 'length');
  assert.equal(rig.terminal.get('healthy')!.cachedTokens, 0);
});

test('the least recently used blocks are evicted first, the end of a chain before its start', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 8, maxStepTokens: 64, maxNumSeqs: 4, maxOpen: 8 });
  const run = (id: string, prompt: number[]) => {
    rig.submit(makeRequest(id, prompt, { maxTokens: 1 }));
    while (rig.step());
    return rig.terminal.get(id)!.cachedTokens;
  };
  run('a', promptOf(1, 16));
  run('b', promptOf(2, 12)); // 7 blocks published, 1 free
  run('c', promptOf(3, 8)); // takes the free block and the last block of a
  assert.equal(run('b again', promptOf(2, 12)), 12);
  assert.equal(run('a again', promptOf(1, 16)), 12);
});

test('decodes come first and a long prefill is chunked beside them', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 64, maxStepTokens: 8, maxNumSeqs: 4, maxOpen: 8 });
  rig.submit(makeRequest('short', promptOf(1, 4), { maxTokens: 20 }));
  rig.step();
  rig.submit(makeRequest('long', promptOf(2, 40), { maxTokens: 4 }));
  for (let step = 0; step < 5; step++) {
    const before = rig.tokens.get('short')!.length;
    rig.step();
    assert.equal(rig.tokens.get('short')!.length, before + 1, 'the decode advances in every step');
    assert.equal(rig.tokens.get('long')!.length, 0);
  }
  rig.drain();
});

test('a late abort, of an unknown or a finished id, does nothing', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 8, maxStepTokens: 8, maxNumSeqs: 2, maxOpen: 4 });
  assert.equal(rig.scheduler.end('unknown', 'abort'), null);
  rig.submit(makeRequest('r', promptOf(1, 4), { maxTokens: 1 }));
  rig.drain();
  assert.equal(rig.scheduler.end('r', 'abort'), null);
});

test('stop tokens are banned until minTokens are reached', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 8, maxStepTokens: 8, maxNumSeqs: 2, maxOpen: 4 });
  const free = makeRequest('free', promptOf(1, 4), { maxTokens: 6 });
  const [first] = expectedTokens(free, VOCAB_SIZE, 32);
  rig.submit(makeRequest('stops', promptOf(1, 4), { maxTokens: 6, stopTokenIds: [first!] }));
  rig.submit(makeRequest('goes on', promptOf(1, 4), { maxTokens: 6, stopTokenIds: [first!], minTokens: 3 }));
  rig.drain();
  assert.deepEqual(rig.tokens.get('stops'), [first]);
  assert.ok(rig.tokens.get('goes on')!.length >= 3);
  assert.ok(!rig.tokens.get('goes on')!.slice(0, 3).includes(first!));
});

test('a hash alone is no hit: token ids and parent are compared', () => {
  const pool = new BlockPool(4);
  const cache = new PrefixCache(pool, 2, 'fake');
  const blockId = cache.take()!;
  cache.publish(blockId, 0, ['hash'], 'root', [1, 2]);
  assert.deepEqual(cache.takePrefix(['hash'], 'root', [1, 3]), []);
  assert.deepEqual(cache.takePrefix(['hash'], 'another root', [1, 2]), []);
  assert.deepEqual(cache.takePrefix(['hash'], 'root', [1, 2]), [blockId]);
  cache.release([blockId]);
  cache.release([blockId]);
  cache.checkCounts();
  cache.checkInvariant();
});

test('options that could starve a sequence are refused', () => {
  const limits = { vocabSize: VOCAB_SIZE, maxContext: 16, maxOpen: 4 };
  const options = { blockSize: 4, numBlocks: 4, maxStepTokens: 4, maxNumSeqs: 4, fingerprint: '', limits };
  assert.throws(() => new Scheduler({ ...options, maxStepTokens: 3 }), /maxStepTokens/);
  assert.throws(() => new Scheduler({ ...options, numBlocks: 3 }), /maxContext/);
});
