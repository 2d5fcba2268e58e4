import type { StepBatch } from './step-batch.js';

/** What a batch computes, and where. */
export type BatchTokens = Pick<
  StepBatch,
  'tokenIds' | 'positions' | 'slotMapping' | 'qStart' | 'blockTableStart' | 'blockTable' | 'numSampled'
>;

/** A batch of greedy sequences without options, drafts or logits; `rest` says what is otherwise. */
export function plainBatch(tokens: BatchTokens, rest: Partial<StepBatch> = {}): StepBatch {
  const count = tokens.numSampled.length; // S
  return {
    ...tokens,
    runMtp: new Uint8Array(count), // [S]
    numDrafts: new Int32Array(count), // [S]
    temperature: new Float32Array(count), // [S]
    topP: new Float32Array(count).fill(1), // [S]
    topK: new Int32Array(count), // [S]
    minP: new Float32Array(count), // [S]
    seedLow: new Uint32Array(count), // [S]
    seedHigh: new Uint32Array(count), // [S]
    presencePenalty: new Float32Array(count), // [S]
    frequencyPenalty: new Float32Array(count), // [S]
    repetitionPenalty: new Float32Array(count).fill(1), // [S]
    numLogprobs: new Int32Array(count).fill(-1), // [S]
    historyStart: new Int32Array(count + 1), // [S + 1]
    historyIds: new Int32Array(0), // [0]
    historyCounts: new Int32Array(0), // [0]
    biasStart: new Int32Array(count + 1), // [S + 1]
    biasIds: new Int32Array(0), // [0]
    biasValues: new Float32Array(0), // [0]
    maskStart: new Int32Array(count + 1), // [S + 1]
    masks: new Int32Array(0), // [0]
    logitRows: new Int32Array(0), // [0]
    draftLogitRows: new Int32Array(0), // [0]
    ...rest,
  };
}
