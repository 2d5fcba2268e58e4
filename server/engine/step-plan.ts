import type { TokenLogprobs } from './request.js';
import type { Sequence } from './sequence.js';

/**
 * A sequence's part in one step: tokens start .. start+count-1 are computed, of which the last ones may be drafts, and
 * the last numSampled of them sampled.
 */
export interface PlannedSequence {
  sequence: Sequence;
  start: number;
  count: number;
  /** 0 in the middle of a prefill, 1 + drafts otherwise */
  numSampled: number;
  /** drafts that this step verifies, after the sequence's own tokens */
  draftIds: number[]; // [max(0, numSampled - 1)]
  /** whether the MTP module makes its entries of the confirmed tokens */
  runMtp: boolean;
  /** drafts wanted for the next step */
  numDrafts: number;
  /** the sequence's when this was planned */
  epoch: number;
  /** its token is what this row of the step before samples; left out where the token is known */
  rowBefore?: number;
}

/** What one step computes, in the order of the batch. */
export interface StepPlan {
  sequences: PlannedSequence[]; // [S]
}

export interface SampledToken {
  id: number;
  logprobs: TokenLogprobs | undefined;
}

/** What came out for one planned sequence. */
export type SequenceOutcome =
  | { kind: 'computed' }
  /**
   * tokens: what the target sampled after the last confirmed token and after each accepted draft. Fewer where a later
   * row came out unusable: the next step computes that row again, as its first.
   */
  | { kind: 'sampled'; tokens: SampledToken[]; draftIds: number[] } // [1 .. numSampled], [at most numDrafts]
  | { kind: 'non_finite' }
  | { kind: 'failed'; message: string };
