import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FixedDrafts } from '../../server/engine/draft-policy.js';
import type { EmittedToken, EngineEvent, EngineRequest, ThinkingControl } from '../../server/engine/request.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { FakeRunner, makeRequest } from '../helpers/fake-runner.js';
import { StepDriver } from '../helpers/step-driver.js';

/** Small, so that the fake model runs into markers by itself. */
const VOCAB_SIZE = 23;
const MARKERS = { thinkStart: 1, thinkEnd: 2, toolCallsBegin: 3, toolCallsEnd: 4 };
const EXTEND_IDS = [18, 19];

interface Setup {
  blockSize: number;
  numBlocks: number;
  maxStepTokens: number;
  maxNumSeqs: number;
}

/** A control that a client sends in a step, before it is planned or while it runs; of the request number `which`. */
interface Asked {
  step: number;
  isDuring: boolean;
  which: number;
  control: ThinkingControl;
}

interface Outcome {
  tokens: EmittedToken[];
  last: EngineEvent;
  /** tokens that had been sent when a control came */
  sentBefore: { asked: Asked; numTokens: number; isReasoning: boolean }[];
}

function run(
  setup: Setup,
  requests: readonly EngineRequest[],
  asked: readonly Asked[] = [],
  numDrafts = 0,
  isAhead = false,
) {
  const scheduler = new Scheduler({
    ...setup,
    fingerprint: 'fake',
    drafts: new FixedDrafts(numDrafts),
    limits: { vocabSize: VOCAB_SIZE, maxContext: setup.numBlocks * setup.blockSize, maxOpen: 100 },
  });
  const runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
  const driver = new StepDriver(scheduler, runner, isAhead);
  const outcomes = new Map<string, Outcome>();
  for (const request of requests) {
    scheduler.add(request);
    outcomes.set(request.requestId, { tokens: [], last: null!, sentBefore: [] });
  }
  const send = (step: number, isDuring: boolean): void => {
    for (const one of asked) {
      if (one.step !== step || one.isDuring !== isDuring) continue;
      const { requestId, startPhase } = requests[one.which % requests.length]!;
      const outcome = outcomes.get(requestId)!;
      const label = outcome.tokens.at(-1);
      const isReasoning = label === undefined ? startPhase === 'reasoning' : label.phase === 'reasoning';
      outcome.sentBefore.push({ asked: one, numTokens: outcome.tokens.length, isReasoning });
      scheduler.control(requestId, one.control);
    }
  };
  for (let step = 0; ; step++) {
    send(step, false);
    const events = driver.step(() => send(step, true));
    if (events === null) break;
    for (const event of events) {
      const outcome = outcomes.get(event.requestId)!;
      outcome.tokens.push(...event.tokens);
      outcome.last = event;
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
      hasStop: fc.boolean(),
      budget: fc.constantFrom(5, 17, Infinity),
      minAnswerTokens: fc.constantFrom(0, 7),
      loopTokens: fc.constantFrom(0, 3),
      startPhase: fc.constantFrom('reasoning' as const, 'reasoning' as const, 'answer' as const),
    }),
    { minLength: 1, maxLength: 6 },
  )
  .map((list) =>
    list.map(({ promptLength, maxTokens, seed, hasStop, startPhase, ...rest }, i) =>
      makeRequest(
        `r${i}`,
        Array.from({ length: promptLength }, (_, at) => (at * 5) % VOCAB_SIZE),
        { maxTokens, seed, temperature: 1, stopTokenIds: hasStop ? [0] : [] },
        {
          markers: MARKERS,
          startPhase,
          thinking: { ...rest, endIds: [20, 21, MARKERS.thinkEnd], extendIds: EXTEND_IDS },
        },
      ),
    ),
  );

const controls: fc.Arbitrary<Asked[]> = fc.array(
  fc.record({
    step: fc.integer({ min: 0, max: 20 }),
    isDuring: fc.boolean(),
    which: fc.nat(5),
    control: fc.oneof(
      fc.constant({ kind: 'end' as const }),
      fc.integer({ min: 1, max: 30 }).map((numTokens) => ({ kind: 'extend' as const, numTokens })),
    ),
  }),
  { maxLength: 8 },
);

test('controls come out the same by their marks: from the start, and behind any token', () => {
  const seen = { end: 0, extend: 0, preempted: 0, resumed: 0 };
  fc.assert(
    fc.property(
      requests,
      controls,
      fc.record({
        blockSize: fc.constantFrom(1, 4),
        numBlocks: fc.integer({ min: 84, max: 100 }),
        maxNumSeqs: fc.integer({ min: 1, max: 6 }),
        extraTokens: fc.integer({ min: 0, max: 20 }),
        numDrafts: fc.constantFrom(0, 0, 1, 2, 3, 4),
        isAhead: fc.boolean(),
        cut: fc.nat(60),
      }),
      (list, asked, { numDrafts, isAhead, extraTokens, numBlocks, blockSize, maxNumSeqs, cut }) => {
        const setup = {
          blockSize,
          maxNumSeqs,
          maxStepTokens: maxNumSeqs + extraTokens,
          numBlocks: Math.ceil(numBlocks / blockSize),
        };
        const { outcomes, scheduler } = run(setup, list, asked, numDrafts, isAhead);
        seen.preempted += scheduler.stats().numPreemptions;
        for (const request of list) {
          const { tokens, last } = outcomes.get(request.requestId)!;
          const marks = last.controls ?? [];
          for (const { kind } of marks) seen[kind]++;
          const again = { ...request, controls: marks };
          const alone = run(ALONE, [again]).outcomes.get(request.requestId)!;
          assert.deepEqual(alone.tokens, tokens);
          assert.equal(alone.last.reasoningEnded, last.reasoningEnded);
          // Behind what one event has brought: forced tokens come whole.
          const length = Math.min(cut, tokens.length - 1);
          if (length < 1 || tokens[length]!.forced) continue;
          seen.resumed++;
          const resumedIds = tokens.slice(0, length).map(({ id }) => id);
          const rest = run(ALONE, [{ ...again, resumedIds }]).outcomes.get(request.requestId)!;
          assert.deepEqual(rest.tokens, tokens.slice(length));
        }
      },
    ),
    { numRuns: 300 },
  );
  for (const [what, count] of Object.entries(seen)) assert.ok(count > 20, `${what}: ${count}`);
});

test('an end takes effect at once: reasoning is what had been sent, and the answer follows', () => {
  let numEnded = 0;
  fc.assert(
    fc.property(requests, controls, fc.integer({ min: 0, max: 4 }), fc.boolean(), (list, all, numDrafts, isAhead) => {
      const asked = all.filter(({ control }) => control.kind === 'end');
      const { outcomes } = run({ ...ALONE, maxNumSeqs: 6 }, list, asked, numDrafts, isAhead);
      for (const request of list) {
        const { tokens, last, sentBefore } = outcomes.get(request.requestId)!;
        for (const { numTokens, isReasoning } of sentBefore) {
          // The last token that had been sent may have been the completion's last.
          if (!isReasoning || numTokens === tokens.length) continue;
          numEnded++;
          const next = tokens[numTokens]!;
          assert.deepEqual([next.id, next.phase, next.forced], [MARKERS.thinkEnd, 'control', true]);
          assert.ok(last.controls!.some(({ kind, at }) => kind === 'end' && at === numTokens));
          assert.equal(last.reasoningEnded, 'client');
        }
      }
    }),
    { numRuns: 300 },
  );
  assert.ok(numEnded > 20, `${numEnded}`);
});

test('extended reasoning has as many tokens as were asked for, unless the answer needs the room', () => {
  let numExtended = 0;
  let numHeld = 0;
  fc.assert(
    fc.property(requests, controls, fc.integer({ min: 0, max: 4 }), (list, all, numDrafts) => {
      const asked = all.filter(({ control }) => control.kind === 'extend');
      const { outcomes } = run({ ...ALONE, maxNumSeqs: 6 }, list, asked, numDrafts);
      for (const request of list) {
        const { tokens, last } = outcomes.get(request.requestId)!;
        const { minAnswerTokens, endIds } = request.thinking!;
        for (const mark of last.controls ?? []) {
          assert.ok(mark.kind === 'extend');
          const end = tokens.findIndex(({ id, phase }, at) => at >= mark.at && phase === 'control' && id === 2);
          if (end < 0) continue;
          numExtended++;
          const numReasoning = tokens.slice(0, end).filter(({ phase }) => phase === 'reasoning').length;
          const numLeft = request.sampling.maxTokens - end;
          const needsRoom = numLeft <= EXTEND_IDS.length + endIds.length + minAnswerTokens;
          assert.ok(numReasoning >= mark.untilReasoning || needsRoom || last.reasoningEnded === 'answer_reserve');
        }
        numHeld += tokens.filter(({ id, forced }) => forced && id === EXTEND_IDS[0]).length;
      }
    }),
    { numRuns: 300 },
  );
  assert.ok(numExtended > 20 && numHeld > 10, `${numExtended} ${numHeld}`);
});

test('who is not reasoning is not steered', () => {
  const list = [makeRequest('r', [5], { maxTokens: 9 }, { markers: MARKERS, startPhase: 'answer' })];
  const { outcomes } = run(ALONE, list, [{ step: 0, isDuring: false, which: 0, control: { kind: 'end' } }]);
  assert.equal(outcomes.get('r')!.last.controls, undefined);
});
