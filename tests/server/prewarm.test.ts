import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { makeRequest } from '../helpers/fake-runner.js';
import { promptOf, Rig, setups, type Setup } from '../helpers/scheduler-rig.js';

const SETUP: Setup = { blockSize: 4, numBlocks: 64, maxStepTokens: 16, maxNumSeqs: 4, maxOpen: 8 };

/** Runs until nothing is left to do. */
function runOut(rig: Rig): void {
  for (let steps = 0; rig.step(); steps++) assert.ok(steps < 1000);
}

test('what the next prompt begins with is computed in idle time, and what it supersedes is given up', () => {
  const rig = new Rig(SETUP);
  const prompt = promptOf(0, 10);
  rig.submit(makeRequest('turn', prompt, { maxTokens: 30 }));
  runOut(rig);
  const superseded = [...prompt, ...rig.tokens.get('turn')!];
  const before = rig.scheduler.stats();
  // The prompt, then an answer without its reasoning, and a part of the next question.
  const next = [...prompt, ...superseded.slice(30), 7];
  rig.prewarm(next, superseded);
  const cleared = rig.scheduler.stats();
  const numOwn = Math.floor((superseded.length - 1) / 4) - Math.floor(prompt.length / 4);
  assert.equal(cleared.numCachedBlocks, before.numCachedBlocks - numOwn);
  runOut(rig);
  const after = rig.scheduler.stats();
  const numFull = Math.floor(next.length / 4);
  assert.equal(after.prewarmedTokens, 4 * (numFull - Math.floor(prompt.length / 4)));
  assert.deepEqual(
    [after.promptTokens, after.generationTokens, after.prefixCacheQueries],
    [before.promptTokens, before.generationTokens, before.prefixCacheQueries],
  );
  rig.submit(makeRequest('next', [...next, 1, 2, 3], { maxTokens: 5 }));
  runOut(rig);
  assert.equal(rig.terminal.get('next')!.cachedTokens, 4 * numFull);
});

test('a request waits for no more than the step that runs, and what was computed is not lost', () => {
  const rig = new Rig({ ...SETUP, maxStepTokens: 16 });
  const next = promptOf(1, 60);
  rig.prewarm(next, []);
  rig.step();
  const { prewarmedTokens, numRunning } = rig.scheduler.stats();
  assert.deepEqual([prewarmedTokens, numRunning], [8, 0]);
  rig.submit(makeRequest('r', promptOf(2, 5), { maxTokens: 9 }));
  while (rig.open().length > 0) {
    rig.step();
    if (rig.open().length > 0) assert.equal(rig.scheduler.stats().prewarmedTokens, 8, 'others run alone');
  }
  runOut(rig);
  assert.equal(rig.scheduler.stats().prewarmedTokens, 60);
});

test('a part that is being computed takes no place in the queue', () => {
  const rig = new Rig({ ...SETUP, blockSize: 8, numBlocks: 12, maxStepTokens: 1, maxNumSeqs: 1, maxOpen: 1 });
  rig.prewarm(promptOf(0, 8), []);
  rig.step();
  rig.submit(makeRequest('r', promptOf(1, 3), { maxTokens: 2 }));
  assert.deepEqual(rig.open(), ['r']);
  rig.drain();
});

test('what has no room is given up, and nothing of it stays', () => {
  const rig = new Rig({ ...SETUP, numBlocks: 16 });
  rig.submit(makeRequest('long', promptOf(0, 20), { maxTokens: 40 }));
  runOut(rig);
  rig.prewarm(promptOf(2, 200), []);
  rig.prewarm(promptOf(2, 63), []);
  runOut(rig);
  rig.drain();
  assert.equal(rig.step(), false);
});

test('with prompts prewarmed at any time, requests come out as without', () => {
  const script = fc.array(
    fc.record({
      kind: fc.constantFrom('submit', 'prewarm', 'step', 'step', 'step'),
      family: fc.integer({ min: 0, max: 2 }),
      length: fc.integer({ min: 1, max: 40 }),
      other: fc.integer({ min: 0, max: 2 }),
      seed: fc.bigInt({ min: 0n, max: 1000n }),
    }),
    { minLength: 10, maxLength: 60, size: 'max' },
  );
  let numPrewarmed = 0;
  fc.assert(
    fc.property(setups, script, (setup, commands) => {
      const rig = new Rig(setup);
      for (const [index, { kind, family, length, other, seed }] of commands.entries()) {
        const ids = promptOf(family, length);
        if (kind === 'step') rig.step();
        else if (kind === 'submit')
          rig.submit(makeRequest(`r${index}`, ids, { maxTokens: length, seed, temperature: 1 }));
        else rig.prewarm(ids, promptOf(other, 40));
        rig.checkAll();
      }
      rig.drain(); // compares what came out with what the model gives
      numPrewarmed += rig.scheduler.stats().prewarmedTokens;
    }),
    { numRuns: 150 },
  );
  assert.ok(numPrewarmed > 1000, `${numPrewarmed}`);
});
