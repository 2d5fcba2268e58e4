import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FixedDrafts } from '../../server/engine/draft-policy.js';
import { Engine } from '../../server/engine/engine.js';
import { packStep, unpackStep } from '../../server/engine/pack-step.js';
import type { EngineEvent } from '../../server/engine/request.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { FakeRunner, expectedTokens, makeRequest } from '../helpers/fake-runner.js';
import { Rig, VOCAB_SIZE, commands, play, promptOf, setups } from '../helpers/scheduler-rig.js';

const SETUP = { blockSize: 4, numBlocks: 64, maxStepTokens: 32, maxNumSeqs: 4 };
const LIMITS = { vocabSize: VOCAB_SIZE, maxContext: SETUP.blockSize * SETUP.numBlocks, maxOpen: 16 };

test('steps ahead change no output and no block, whatever is asked for', () => {
  const totals = { numPreemptions: 0, prefixCacheHits: 0 };
  let numAhead = 0;
  let numSteps = 0;
  const drafts = fc.constantFrom(0, 0, 0, 2);
  fc.assert(
    fc.property(setups, commands, drafts, (setup, script, numDrafts) => {
      const makeDrafts = () => new FixedDrafts(numDrafts);
      const rig = play(setup, script, makeDrafts, true);
      assert.deepEqual(play(setup, script, makeDrafts, true).trace, rig.trace);
      const stats = rig.scheduler.stats();
      for (const name of Object.keys(totals) as (keyof typeof totals)[]) totals[name] += stats[name];
      numAhead += rig.runner.numAhead;
      numSteps += rig.runner.numSteps;
    }),
    { numRuns: 300 },
  );
  assert.ok(totals.numPreemptions > 50, `the runs preempt: ${totals.numPreemptions}`);
  assert.ok(totals.prefixCacheHits > 500, `the runs hit the prefix cache: ${totals.prefixCacheHits}`);
  assert.ok(numAhead > 1000 && numAhead < numSteps, `${numAhead} of ${numSteps} steps are ahead`);
});

test('decodes that nothing disturbs run ahead, one step after the other', () => {
  const rig = new Rig({ ...SETUP, maxOpen: 8 }, undefined, true);
  for (let index = 0; index < 3; index++) {
    rig.submit(makeRequest(`r${index}`, promptOf(index, 6), { maxTokens: 30, minTokens: 9, stopTokenIds: [50] }));
  }
  rig.drain();
  // The prompts' step is not ahead; nor is a step after the last one is known.
  assert.ok(rig.runner.numAhead >= 20 && rig.runner.numAhead === rig.runner.numSteps - 1, `${rig.runner.numAhead}`);
});

/** The plan ahead of a step of these requests, each with a prompt of 6 tokens; null where there is none. */
function aheadOf(requests: Parameters<typeof makeRequest>[2][], rest: Parameters<typeof makeRequest>[3] = {}) {
  const scheduler = new Scheduler({ ...SETUP, fingerprint: 'fake', limits: LIMITS });
  for (const [index, sampling] of requests.entries()) {
    scheduler.add(makeRequest(`r${index}`, promptOf(index, 6), sampling, rest));
  }
  const plan = scheduler.schedule()!;
  return { scheduler, plan, ahead: scheduler.scheduleAhead(plan) };
}

test('who depends on the tokens before, or ends, or waits for a place, is not run ahead', () => {
  const namesOf = ({ ahead }: ReturnType<typeof aheadOf>) => ahead?.sequences.map(({ sequence }) => sequence.id) ?? [];
  assert.deepEqual(namesOf(aheadOf([{}, {}])), ['r0', 'r1']);
  assert.deepEqual(namesOf(aheadOf([{}, { maxTokens: 1 }, {}])), ['r0', 'r2'], 'r1 ends by its length');
  assert.deepEqual(namesOf(aheadOf([{ maxTokens: 1 }])), []);
  assert.deepEqual(namesOf(aheadOf([{}, { frequencyPenalty: 1 }])), [], 'a penalty needs the tokens');
  assert.deepEqual(namesOf(aheadOf([{}], { prefillOnly: true })), []);
  assert.deepEqual(namesOf(aheadOf([{}, {}, {}, {}, {}])), ['r0', 'r1', 'r2', 'r3'], 'r4 has no place');
  assert.deepEqual(namesOf(aheadOf([{}, { maxTokens: 1 }, {}, {}, {}])), [], 'r4 gets the place of r1');
  const { plan, ahead } = aheadOf([{}, { maxTokens: 1 }, {}]);
  assert.deepEqual([...packStep(plan, 4).numSampled], [1, 1, 1]);
  const batch = packStep(ahead!, 4);
  assert.deepEqual([...batch.tokenIds], [-1, -3], 'rows of the step before');
  assert.deepEqual([...batch.positions], [6, 6]);
});

test('stop tokens are banned up to minTokens, counting the token that is not known yet', () => {
  const { ahead } = aheadOf([
    { minTokens: 1, stopTokenIds: [7] },
    { minTokens: 2, stopTokenIds: [7] },
  ]);
  const batch = packStep(ahead!, 4);
  assert.deepEqual([...batch.biasStart], [0, 0, 1]);
});

test('a sequence that ends by a stop token leaves its step ahead without a trace', () => {
  const prompt = promptOf(1, 6);
  const plain = makeRequest('plain', prompt, { maxTokens: 20 });
  const expected = expectedTokens(plain, VOCAB_SIZE, LIMITS.maxContext);
  const scheduler = new Scheduler({ ...SETUP, fingerprint: 'fake', limits: LIMITS });
  const runner = new FakeRunner({ ...SETUP, vocabSize: VOCAB_SIZE });
  scheduler.add(makeRequest('r', prompt, { maxTokens: 20, stopTokenIds: [expected[0]!] }));
  const plan = scheduler.schedule()!;
  const result = runner.stepNow(packStep(plan, 4));
  const ahead = scheduler.scheduleAhead(plan)!;
  const resultAhead = runner.stepNow(packStep(ahead, 4));
  const [event] = scheduler.commit(plan, unpackStep(plan, result, VOCAB_SIZE));
  assert.equal(event!.finishReason, 'stop');
  assert.deepEqual(scheduler.commit(ahead, unpackStep(ahead, resultAhead, VOCAB_SIZE)), []);
  scheduler.checkInvariant();
  const { numFreeBlocks, numCachedBlocks, generationTokens } = scheduler.stats();
  assert.deepEqual([numFreeBlocks + numCachedBlocks, numCachedBlocks, generationTokens], [64, 1, 1]);
});

test('a step that the runner refuses takes the one ahead with it; each sequence is run alone and goes on', async () => {
  const setup = { ...SETUP, numBlocks: 256, maxNumSeqs: 16 };
  const runner = new FakeRunner({ vocabSize: VOCAB_SIZE, ...setup });
  const engine = new Engine(runner, {
    ...setup,
    fingerprint: 'fake',
    launchAhead: true,
    limits: { ...LIMITS, maxContext: 1024 },
    info: { device: 'fake', weightBytes: 0, cacheBytes: 0 },
  });
  const requests = Array.from({ length: 6 }, (_, index) =>
    makeRequest(`r${index}`, promptOf(index, 7), { maxTokens: 25, seed: BigInt(index), temperature: 1 }),
  );
  // The token that some of them sample on the way is what the runner refuses to compute.
  const expected = requests.map((request) => expectedTokens(request, VOCAB_SIZE, 1024));
  runner.throwOn = expected[2]![10]!;
  const ids = await Promise.all(
    requests.map(async (request) => {
      const tokens: number[] = [];
      let last: EngineEvent | undefined;
      for await (const event of engine.submit(request)) {
        tokens.push(...event.tokens.map(({ id }) => id));
        last = event;
      }
      return { tokens, reason: last!.finishReason };
    }),
  );
  for (const [index, { tokens, reason }] of ids.entries()) {
    const sentence = [...requests[index]!.promptIds, ...expected[index]!];
    const refusedAt = sentence.slice(0, -1).indexOf(runner.throwOn);
    if (refusedAt < 0) assert.deepEqual([tokens, reason], [expected[index], 'length']);
    else {
      assert.equal(reason, 'error');
      assert.deepEqual(tokens, expected[index]!.slice(0, Math.max(0, refusedAt - 6)));
    }
  }
  assert.ok(runner.numAhead > 10);
  engine.checkInvariant();
  await engine.close();
});
