import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FixedDrafts } from '../../server/engine/draft-policy.js';
import type { EmittedToken, EngineEvent, EngineRequest, ThinkingLimits } from '../../server/engine/request.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { Steering } from '../../server/engine/steering.js';
import { FakeRunner, makeRequest } from '../helpers/fake-runner.js';
import { StepDriver } from '../helpers/step-driver.js';

/** Small, so that the fake model runs into markers and loops by itself. */
const VOCAB_SIZE = 23;
const MARKERS = { thinkStart: 1, thinkEnd: 2, toolCallsBegin: 3, toolCallsEnd: 4 };
const PHRASE = [20, 21, 22];
const END_IDS = [...PHRASE, MARKERS.thinkEnd];

interface Outcome {
  tokens: EmittedToken[];
  last: EngineEvent;
}

interface Setup {
  blockSize: number;
  numBlocks: number;
  maxStepTokens: number;
  maxNumSeqs: number;
}

/** Runs requests together and returns what each of them got. */
function run(
  setup: Setup,
  requests: readonly EngineRequest[],
  numDrafts = 0,
  isAhead = false,
): { outcomes: Map<string, Outcome>; scheduler: Scheduler } {
  const scheduler = new Scheduler({
    ...setup,
    fingerprint: 'fake',
    drafts: new FixedDrafts(numDrafts),
    limits: { vocabSize: VOCAB_SIZE, maxContext: setup.numBlocks * setup.blockSize, maxOpen: 100 },
  });
  const runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
  const driver = new StepDriver(scheduler, runner, isAhead);
  const outcomes = new Map<string, Outcome>();
  const waiting = [...requests];
  for (;;) {
    const next = waiting.shift();
    if (next) scheduler.add(next);
    const events = driver.step();
    if (events === null) break;
    for (const event of events) {
      const tokens = [...(outcomes.get(event.requestId)?.tokens ?? []), ...event.tokens];
      outcomes.set(event.requestId, { tokens, last: event });
      assert.equal(
        event.reasoningEnded !== undefined,
        tokens.some((token) => token.forced),
      );
    }
    scheduler.checkInvariant();
  }
  return { outcomes, scheduler };
}

const ALONE: Setup = { blockSize: 8, numBlocks: 64, maxStepTokens: 256, maxNumSeqs: 1 };

const requests: fc.Arbitrary<EngineRequest[]> = fc
  .array(
    fc.record({
      promptLength: fc.integer({ min: 1, max: 20 }),
      maxTokens: fc.integer({ min: 1, max: 60 }),
      seed: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
      frequencyPenalty: fc.constantFrom(0, 1),
      hasStop: fc.boolean(),
      budget: fc.constantFrom(0, 1, 2, 5, 17, Infinity),
      hasPhrase: fc.boolean(),
      minAnswerTokens: fc.constantFrom(0, 1, 7, 30),
      loopTokens: fc.constantFrom(0, 2, 2, 3),
      startPhase: fc.constantFrom('reasoning' as const, 'reasoning' as const, 'answer' as const),
      priority: fc.integer({ min: -1, max: 1 }),
    }),
    { minLength: 1, maxLength: 8 },
  )
  .map((list) =>
    list.map(
      ({ promptLength, maxTokens, seed, frequencyPenalty, hasStop, hasPhrase, startPhase, priority, ...rest }, i) =>
        makeRequest(
          `r${i}`,
          Array.from({ length: promptLength }, (_, at) => (at * 5) % VOCAB_SIZE),
          { maxTokens, seed, temperature: 1, frequencyPenalty, stopTokenIds: hasStop ? [0] : [] },
          {
            markers: MARKERS,
            startPhase,
            priority,
            thinking: { ...rest, endIds: hasPhrase ? END_IDS : [MARKERS.thinkEnd] },
          },
        ),
    ),
  );

/** Limits checked by counting, with nothing of Steering's own bookkeeping. */
function checkLimits(request: EngineRequest, { tokens, last }: Outcome): void {
  const { budget, endIds, minAnswerTokens } = request.thinking!;
  const sampled = tokens.filter(({ forced }) => !forced);
  assert.ok(tokens.length <= request.sampling.maxTokens);
  const firstForced = tokens.findIndex(({ forced }) => forced);
  assert.equal(last.reasoningEnded !== undefined, firstForced >= 0);
  if (firstForced < 0) return;
  const forced = tokens.slice(firstForced, firstForced + endIds.length);
  assert.ok(forced.every((token) => token.forced && token.logprobs === undefined));
  assert.deepEqual(
    forced.map(({ id }) => id),
    endIds.slice(0, forced.length),
  );
  if (forced.length < endIds.length)
    assert.equal(last.finishReason, last.stopTokenId === undefined ? 'length' : 'stop');
  const before = tokens.slice(0, firstForced).filter(({ phase }) => phase === 'reasoning').length;
  if (last.reasoningEnded === 'budget') assert.ok(before === budget || budget === 0);
  assert.ok(before <= Math.max(1, budget));
  if (last.reasoningEnded === 'answer_reserve') {
    assert.ok(request.sampling.maxTokens - firstForced - endIds.length <= minAnswerTokens);
  }
  assert.ok(sampled.length > 0);
}

test('forced tokens are the same alone, in chunks, in a crowd, after preemptions with drafts, and ahead', () => {
  const seen = { budget: 0, answer_reserve: 0, loop: 0, none: 0, client: Infinity };
  let numPreemptions = 0;
  fc.assert(
    fc.property(
      requests,
      fc.record({
        blockSize: fc.constantFrom(1, 4),
        numBlocks: fc.integer({ min: 84, max: 100 }),
        maxNumSeqs: fc.integer({ min: 1, max: 8 }),
        extraTokens: fc.integer({ min: 0, max: 20 }),
        numDrafts: fc.constantFrom(0, 0, 1, 2, 3, 4),
        isAhead: fc.boolean(),
      }),
      (list, { numDrafts, isAhead, extraTokens, numBlocks, blockSize, maxNumSeqs }) => {
        const setup = {
          blockSize,
          maxNumSeqs,
          maxStepTokens: maxNumSeqs + extraTokens,
          numBlocks: Math.ceil(numBlocks / blockSize),
        };
        const { outcomes, scheduler } = run(setup, list, numDrafts, isAhead);
        numPreemptions += scheduler.stats().numPreemptions;
        for (const request of list) {
          const outcome = outcomes.get(request.requestId)!;
          const alone = run(ALONE, [request]).outcomes.get(request.requestId)!;
          assert.deepEqual(outcome.tokens, alone.tokens);
          assert.equal(outcome.last.reasoningEnded, alone.last.reasoningEnded);
          checkLimits(request, outcome);
          seen[outcome.last.reasoningEnded ?? 'none']++;
        }
      },
    ),
    { numRuns: 300 },
  );
  for (const [reason, count] of Object.entries(seen)) assert.ok(count > 5, `${reason}: ${count}`);
  assert.ok(numPreemptions > 20, `${numPreemptions} preemptions`);
});

const OFF: ThinkingLimits = { budget: Infinity, endIds: [2], minAnswerTokens: 0, loopTokens: 0 };

function firstEnd(thinking: ThinkingLimits, ids: readonly number[]): number {
  const steering = new Steering(thinking);
  for (const [index, id] of ids.entries()) {
    steering.observe(id, 'reasoning');
    if (steering.forcedIds(1000).length > 0) return index + 1;
  }
  return -1;
}

test('a loop is found by its length, whatever its period up to 64, and nothing else is', () => {
  for (const period of [1, 2, 3, 7, 64]) {
    const lead = Array.from({ length: 100 }, (_, i) => 1000 + i);
    const loop = Array.from({ length: 400 }, (_, i) => i % period);
    const end = firstEnd({ ...OFF, loopTokens: 200 }, [...lead, ...loop]);
    assert.equal(end, lead.length + 200, `period ${period}`);
  }
  const period65 = Array.from({ length: 1000 }, (_, i) => i % 65);
  assert.equal(firstEnd({ ...OFF, loopTokens: 200 }, period65), -1);
  assert.equal(firstEnd({ ...OFF, loopTokens: 0 }, Array(1000).fill(7)), -1);
  // Twice the same is a loop only where so little is asked for.
  assert.equal(firstEnd({ ...OFF, loopTokens: 2 }, [1, 2, 3, 3]), 4);
  assert.equal(firstEnd({ ...OFF, loopTokens: 6 }, [1, 2, 3, 1, 2, 3]), 6);
});

test('who reasons again after the end gets the marker alone', () => {
  const steering = new Steering({ ...OFF, budget: 2, endIds: END_IDS });
  steering.observe(9, 'reasoning');
  assert.deepEqual(steering.forcedIds(50), []);
  steering.observe(9, 'reasoning');
  assert.deepEqual(steering.forcedIds(50), END_IDS);
  steering.observe(9, 'reasoning');
  assert.deepEqual(steering.forcedIds(40), [MARKERS.thinkEnd]);
  assert.equal(steering.ended, 'budget');
});

test('lower priority numbers run first, equal ones in order of arrival', () => {
  const setup = { ...ALONE, maxNumSeqs: 1 };
  const list = [0, 5, -3, 0].map((priority, i) => makeRequest(`r${i}`, [5, 6, 7 + i], { maxTokens: 30 }, { priority }));
  assert.deepEqual([...run(setup, list).outcomes.keys()], ['r0', 'r2', 'r3', 'r1']);
});

test('limits without an end, or with an end that is not the marker, are refused', () => {
  const scheduler = new Scheduler({
    ...ALONE,
    fingerprint: '',
    limits: { vocabSize: VOCAB_SIZE, maxContext: 64, maxOpen: 9 },
  });
  for (const thinking of [
    { ...OFF, budget: 3, endIds: [] },
    { ...OFF, budget: 3, endIds: [2, 5] },
    { ...OFF, budget: -1 },
    { ...OFF, budget: 1.5 },
    { ...OFF, minAnswerTokens: NaN },
    { ...OFF, loopTokens: 3, endIds: [99] },
  ]) {
    assert.throws(() => scheduler.add(makeRequest('r', [5], {}, { markers: MARKERS, thinking })), /thinking/);
  }
});
