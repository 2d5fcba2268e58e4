import type { DraftPolicy } from './draft-policy.js';
import type { PlanBuilder } from './plan-builder.js';
import type { PrefixCache } from './prefix-cache.js';
import type { EngineStats } from './request.js';
import type { Sequence } from './sequence.js';
import { MAX_DRAFTS, type StepResult } from './step-batch.js';
import type { PlannedSequence, StepPlan } from './step-plan.js';

type SpeculationCounters = Pick<
  EngineStats,
  'specNumDrafts' | 'specNumDraftTokens' | 'specNumAcceptedTokens' | 'specAcceptedPerPos'
>;

/** The speculative part of step plans: which drafts a step verifies, and where the MTP module makes new ones. */
export class DraftPlanner {
  readonly #policy: DraftPolicy;
  readonly #cache: PrefixCache;
  readonly #blockSize: number;
  readonly #counters: SpeculationCounters = {
    specNumDrafts: 0,
    specNumDraftTokens: 0,
    specNumAcceptedTokens: 0,
    specAcceptedPerPos: new Array<number>(MAX_DRAFTS).fill(0), // [MAX_DRAFTS]
  };

  constructor(policy: DraftPolicy, cache: PrefixCache, blockSize: number) {
    this.#policy = policy;
    this.#cache = cache;
    this.#blockSize = blockSize;
  }

  counters(): SpeculationCounters {
    return { ...this.#counters, specAcceptedPerPos: [...this.#counters.specAcceptedPerPos] };
  }

  /** Lets planned decodes verify the drafts they have, as far as blocks and `numSpare` rows allow. */
  addDrafts(plan: PlanBuilder, numSpare: number, numRunning: number): void {
    for (const part of plan.parts()) {
      const { sequence } = part;
      const wanted = Math.min(sequence.draftIds.length, sequence.maxDrafts, numSpare);
      if (!part.runMtp || wanted <= 0) continue;
      const length = part.start + part.count;
      const count = Math.max(0, this.#cover(sequence, length + wanted, numRunning) - length);
      plan.extend(part, sequence.draftIds.slice(0, count));
      numSpare -= count;
    }
  }

  /** Decides for planned sequences that are sampled whether the MTP module runs, and how many drafts follow. */
  planMtp(parts: PlannedSequence[], numRunning: number): void {
    const sampled = parts.filter(({ runMtp, numSampled }) => runMtp && numSampled > 0);
    if (sampled.length === 0) return;
    const numDrafts = this.#policy.numDrafts(numRunning, sampled.length);
    for (const part of sampled) {
      const { sequence } = part;
      const end = part.start + part.count; // position of the last token that may be sampled
      // Nothing reads the entry of a last token; those of a prompt are for the prefix cache.
      const isLast = sequence.tokens.length + 1 >= sequence.maxTokens && part.count === 1;
      if (numDrafts === null) sequence.runsMtp = false;
      if (numDrafts === null || isLast || this.#cover(sequence, end + 1, 0) <= end) {
        part.runMtp = false;
        continue;
      }
      const room = sequence.followsGrammar ? 0 : sequence.maxTokens - 2 - end;
      const wanted = Math.max(0, Math.min(numDrafts, room));
      part.numDrafts = Math.min(wanted, this.#cover(sequence, end + wanted, numRunning) - end);
    }
  }

  /** Of a sequence's drafts that were verified, the first numAccepted were accepted. */
  count(sequence: Sequence, numDrafted: number, numAccepted: number): void {
    if (numDrafted === 0) return;
    sequence.numDraftTokens += numDrafted;
    sequence.numAcceptedTokens += numAccepted;
    this.#counters.specNumDrafts++;
    this.#counters.specNumDraftTokens += numDrafted;
    this.#counters.specNumAcceptedTokens += numAccepted;
    for (let depth = 0; depth < numAccepted; depth++) this.#counters.specAcceptedPerPos[depth]!++;
    this.#policy.observeVerify(numDrafted, numAccepted);
  }

  /** Tells the policy what a step without prefill has cost. */
  observe({ sequences }: StepPlan, { stepMicros, draftMicros }: StepResult, totalMicros: number): void {
    const drafting = sequences.filter(({ numDrafts }) => numDrafts > 0);
    const numDrafts = drafting[0]?.numDrafts ?? 0;
    const isDecode = sequences.every(({ count, numSampled }) => count === numSampled);
    const isAhead = sequences.some(({ rowBefore }) => rowBefore !== undefined);
    if (!this.#policy.isOn || !isDecode || drafting.some((part) => part.numDrafts !== numDrafts)) return;
    this.#policy.observeStep({
      numRows: sequences.reduce((sum, { count }) => sum + count, 0),
      mainMicros: stepMicros - draftMicros,
      otherMicros: isAhead ? null : Math.max(0, totalMicros - stepMicros),
      numDrafting: drafting.length,
      numDrafts,
      draftMicros,
    });
  }

  /**
   * Gives a sequence free blocks for its first `length` positions, preempting nobody and leaving numKept of them.
   * Returns how many of the positions have room.
   */
  #cover({ blockTable }: Sequence, length: number, numKept: number): number {
    while (blockTable.length * this.#blockSize < length && this.#cache.numAvailable > numKept) {
      blockTable.push(this.#cache.take()!);
    }
    return Math.min(length, blockTable.length * this.#blockSize);
  }
}
