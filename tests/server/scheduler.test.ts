import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { BlockPool } from '../../server/engine/block-pool.js';
import { packStep, unpackStep } from '../../server/engine/pack-step.js';
import { PrefixCache } from '../../server/engine/prefix-cache.js';
import { Scheduler } from '../../server/engine/scheduler.js';
import { expectedTokens, makeRequest } from '../helpers/fake-runner.js';
import { Rig, VOCAB_SIZE, commands, play, promptOf, setups } from '../helpers/scheduler-rig.js';

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

test('a prompt that is only prefilled gives one event without tokens, and its blocks to others', () => {
  const rig = new Rig({ blockSize: 4, numBlocks: 32, maxStepTokens: 8, maxNumSeqs: 4, maxOpen: 8 });
  const prompt = promptOf(1, 22);
  rig.submit(makeRequest('ahead', prompt, {}, { prefillOnly: true }));
  while (rig.step());
  rig.scheduler.checkInvariant();
  assert.deepEqual(rig.tokens.get('ahead') ?? [], []);
  assert.equal(rig.terminal.get('ahead')!.finishReason, 'stop');
  assert.equal(rig.scheduler.stats().generationTokens, 0);
  rig.submit(makeRequest('next', [...prompt, 1, 2, 3]));
  while (rig.step());
  assert.equal(rig.terminal.get('next')!.cachedTokens, 20);
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
  cache.publish(blockId, 0, ['hash'], 'root', [1, 2], false);
  assert.deepEqual(cache.findPrefix(['hash'], 'root', [1, 3]).blockIds, []);
  assert.deepEqual(cache.findPrefix(['hash'], 'another root', [1, 2]).blockIds, []);
  assert.deepEqual(cache.findPrefix(['hash'], 'root', [1, 2]).blockIds, [blockId]);
  cache.takeFound([blockId]);
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
