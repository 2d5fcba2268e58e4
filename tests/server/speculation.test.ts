import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FixedDrafts, type DraftPolicy } from '../../server/engine/draft-policy.js';
import { commands, play, setups } from '../helpers/scheduler-rig.js';

/** Decides at random: whatever a policy does, outputs stay the same. */
class RandomDrafts implements DraftPolicy {
  readonly isOn = true;
  #state: number;

  constructor(seed: number) {
    this.#state = seed;
  }

  #below(limit: number): number {
    this.#state = (Math.imul(this.#state, 1664525) + 1013904223) >>> 0;
    return Math.floor((this.#state / 2 ** 32) * limit);
  }

  wantsMtp(): boolean {
    return this.#below(4) > 0;
  }

  numDrafts(): number | null {
    const choice = this.#below(20);
    return choice === 0 ? null : choice % 5;
  }

  admit(): void {}
  observeVerify(): void {}
  observeStep(): void {}
}

test('drafts change no output and no block: any commands, every number of drafts, any policy', () => {
  const policies = fc.oneof(
    fc.integer({ min: 1, max: 4 }).map((count) => () => new FixedDrafts(count)),
    fc.nat().map((seed) => () => new RandomDrafts(seed)),
  );
  const totals = { numPreemptions: 0, prefixCacheHits: 0, specNumDraftTokens: 0, specNumAcceptedTokens: 0 };
  fc.assert(
    fc.property(setups, commands, policies, (setup, script, makeDrafts) => {
      const rig = play(setup, script, makeDrafts);
      assert.deepEqual(play(setup, script, makeDrafts).trace, rig.trace);
      const stats = rig.scheduler.stats();
      for (const name of Object.keys(totals) as (keyof typeof totals)[]) totals[name] += stats[name];
      assert.equal(
        stats.specAcceptedPerPos.reduce((sum, count) => sum + count, 0),
        stats.specNumAcceptedTokens,
      );
    }),
    { numRuns: 300 },
  );
  assert.ok(totals.numPreemptions > 50, `the runs preempt: ${totals.numPreemptions}`);
  assert.ok(totals.prefixCacheHits > 500, `the runs hit the prefix cache: ${totals.prefixCacheHits}`);
  assert.ok(totals.specNumAcceptedTokens > 5000, `drafts are accepted: ${totals.specNumAcceptedTokens}`);
  assert.ok(totals.specNumDraftTokens > 1.2 * totals.specNumAcceptedTokens, 'and drafts are rejected');
});
