import type { TokenLogprobs } from './request.js';
import type { Sequence } from './sequence.js';

/** A sequence's part in one step: tokens start .. start+count-1 are computed, and the last one sampled or not. */
export interface PlannedSequence {
  sequence: Sequence;
  start: number;
  count: number;
  /** 0 in the middle of a prefill, 1 otherwise */
  numSampled: 0 | 1;
}

/** What one step computes, in the order of the batch. */
export interface StepPlan {
  sequences: PlannedSequence[]; // [S]
}

/** What came out for one planned sequence. */
export type SequenceOutcome =
  | { kind: 'computed' }
  | { kind: 'sampled'; tokenId: number; logprobs: TokenLogprobs | undefined }
  | { kind: 'non_finite' }
  | { kind: 'failed'; message: string };
