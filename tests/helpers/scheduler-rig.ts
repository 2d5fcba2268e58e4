import assert from 'node:assert/strict';
import fc from 'fast-check';
import { BlockPool } from '../../server/engine/block-pool.js';
import type { CacheEvent } from '../../server/engine/cache-events.js';
import type { DraftPolicy } from '../../server/engine/draft-policy.js';
import { PrefixCache } from '../../server/engine/prefix-cache.js';
import type { EngineEvent, EngineRequest } from '../../server/engine/request.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { FakeRunner, expectedTokens, makeRequest } from './fake-runner.js';
import { StepDriver } from './step-driver.js';

export const VOCAB_SIZE = 97;
const FINGERPRINT = 'fake';
/** cache salts that commands use */
const SALTS = ['', 'tenant'];

export interface Setup {
  blockSize: number;
  numBlocks: number;
  maxStepTokens: number;
  maxNumSeqs: number;
  maxOpen: number;
}

/** Makes the policy of a new scheduler; none: nobody drafts. */
export type MakeDrafts = () => DraftPolicy;

export type Command =
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
export class Rig {
  readonly setup: Setup;
  readonly scheduler: Scheduler;
  readonly runner: FakeRunner;
  readonly maxContext: number;
  readonly requests = new Map<string, EngineRequest>();
  readonly tokens = new Map<string, number[]>();
  readonly terminal = new Map<string, EngineEvent>();
  readonly trace: string[] = [];

  readonly #driver: StepDriver;
  readonly #prewarmed: number[][] = [];
  readonly #roots: ReadonlySet<string>;
  /** what a reader of cache events takes for cached */
  readonly #told = new Set<string>();

  /** isAhead: each step is planned and run before the one ahead of it is committed, where the scheduler allows it */
  constructor(setup: Setup, makeDrafts?: MakeDrafts, isAhead = false) {
    this.setup = setup;
    this.maxContext = setup.numBlocks * setup.blockSize;
    this.scheduler = new Scheduler({
      ...setup,
      fingerprint: FINGERPRINT,
      ...(makeDrafts ? { drafts: makeDrafts() } : {}),
      limits: { vocabSize: VOCAB_SIZE, maxContext: this.maxContext, maxOpen: setup.maxOpen },
      onCacheEvent: (event) => this.#hear(event),
    });
    this.runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
    this.#driver = new StepDriver(this.scheduler, this.runner, isAhead);
    const cache = new PrefixCache(new BlockPool(1), 1, FINGERPRINT);
    this.#roots = new Set(SALTS.map((salt) => cache.rootHash(salt)));
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

  prewarm(promptIds: number[], supersededIds: number[]): void {
    this.scheduler.prewarm({ promptIds, cacheSalt: '', supersededIds });
    this.#prewarmed.push(promptIds);
  }

  open(): string[] {
    return [...this.requests.keys()].filter((id) => !this.terminal.has(id));
  }

  abort(requestId: string): void {
    const event = this.scheduler.end(requestId, 'abort');
    if (event !== null) this.take([event]);
    this.checkAll();
  }

  /** One of all requests so far, finished ones included. */
  abortOne(which: number): void {
    const ids = [...this.requests.keys()];
    this.abort(ids[which % Math.max(1, ids.length)] ?? 'unknown');
  }

  step(abortDuring = -1): boolean {
    const onRun = () => {
      if (abortDuring >= 0) this.abortOne(abortDuring);
    };
    const events = this.#driver.step(onRun, ({ sequences }) => {
      const numTokens = sequences.reduce((sum, { count }) => sum + count, 0);
      assert.ok(numTokens <= this.setup.maxStepTokens);
      assert.ok(sequences.length <= this.setup.maxNumSeqs);
      this.checkAll();
    });
    if (events === null) return false;
    this.take(events);
    this.checkAll();
    return true;
  }

  /** The scheduler's invariants, and that whoever hears the cache's events knows what it holds. */
  checkAll(): void {
    this.scheduler.checkInvariant();
    assert.deepEqual([...this.#told].sort(), this.scheduler.findable().sort());
  }

  #hear(event: CacheEvent): void {
    switch (event.kind) {
      case 'stored':
        assert.ok(!this.#told.has(event.hash), 'stored once');
        assert.equal(event.tokenIds.length, this.setup.blockSize);
        this.#told.add(event.hash);
        break;
      case 'removed':
        assert.ok(this.#told.delete(event.hash), 'removed once');
        break;
      case 'cleared':
        assert.fail('a scheduler never clears its cache');
    }
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
    const isPrewarmed = this.#prewarmed.some(
      (ids) => headOf(request, cachedTokens) === headOf({ promptIds: ids }, cachedTokens),
    );
    const isKnown = [...this.requests.values()].some((other) => {
      if (other === request || other.cacheSalt !== request.cacheSalt) return false;
      const all = [...other.promptIds, ...this.tokens.get(other.requestId)!];
      return request.promptIds.slice(0, cachedTokens).every((id, index) => id === all[index]);
    });
    assert.ok(
      isKnown || (isPrewarmed && request.cacheSalt === ''),
      `${cachedTokens} cached tokens that nobody computed`,
    );
  }

  /**
   * Every published block holds what the cache says of it, and continues a prompt and its output: no draft that was
   * rejected was ever hashed.
   */
  checkPublished(): void {
    const published = this.scheduler.published();
    const byHash = new Map(published.map((block) => [block.hash, block]));
    const texts = [...this.requests.values()].map((request) => [
      ...request.promptIds,
      ...expectedTokens(request, VOCAB_SIZE, this.maxContext),
    ]);
    for (const block of published) {
      const chain = [...block.tokenIds];
      let parentHash = block.parentHash;
      for (let parent = byHash.get(parentHash); parent !== undefined; parent = byHash.get(parentHash)) {
        chain.unshift(...parent.tokenIds);
        parentHash = parent.parentHash;
      }
      const stored = this.runner.readBlock(block.blockId, chain);
      assert.deepEqual(stored.tokenIds, [...block.tokenIds]);
      if (!this.#roots.has(parentHash)) continue; // a block before it was evicted
      assert.ok(stored.hasMtp || !block.hasMtp, 'the MTP module has made what the cache says');
      const isText = [...texts, ...this.#prewarmed].some((text) => chain.every((id, index) => id === text[index]));
      assert.ok(isText, 'a published block is part of a prompt and its output');
    }
  }

  drain(): void {
    let numSteps = 0;
    while (this.step()) assert.ok(++numSteps < 100_000, 'every request ends');
    this.checkPublished();
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

function headOf({ promptIds: ids }: Pick<EngineRequest, 'promptIds'>, length: number): string {
  return ids.slice(0, length).join();
}

/** Prompts of one family are prefixes of one another, so that the prefix cache has something to do. */
export function promptOf(family: number, length: number): number[] {
  return Array.from({ length }, (_, index) => (family * 31 + index * 7 + ((index * index) % 5)) % VOCAB_SIZE);
}

export const setups: fc.Arbitrary<Setup> = fc
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

export const commands: fc.Arbitrary<Command[]> = fc.array(
  fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        kind: fc.constant('submit' as const),
        prompt: fc.record({ family: fc.integer({ min: 0, max: 2 }), length: fc.integer({ min: 1, max: 30 }) }),
        salt: fc.constantFrom(...SALTS),
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

export function play(setup: Setup, script: Command[], makeDrafts?: MakeDrafts, isAhead = false): Rig {
  const rig = new Rig(setup, makeDrafts, isAhead);
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
