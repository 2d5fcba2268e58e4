import type { TokenLogprobs } from './request.js';
import type { Sequence } from './sequence.js';
import type { StepBatch, StepResult } from './step-batch.js';
import type { PlannedSequence, SampledToken, SequenceOutcome, StepPlan } from './step-plan.js';

/** Lays a plan out as flat arrays. Tokens whose latents are there already get slot -1. */
export function packStep(plan: StepPlan, blockSize: number): StepBatch {
  const planned = plan.sequences;
  const samplings = planned.map(({ sequence }) => sequence.request.sampling);
  const tokens = planned.flatMap(({ sequence, start, count, draftIds }) => [
    ...sequence.tokens.slice(start, start + count - draftIds.length),
    ...draftIds,
  ]);
  const positions = planned.flatMap(({ start, count }) => Array.from({ length: count }, (_, index) => start + index));
  const history = planned.map(({ sequence, numSampled }) => (numSampled === 0 ? [] : [...sequence.history]));
  const bias = planned.map(({ sequence, numSampled }) => (numSampled === 0 ? [] : biasOf(sequence)));
  const blockTables = planned.map((part) =>
    part.sequence.blockTable.slice(0, Math.ceil(coveredLength(part) / blockSize)),
  );
  return {
    tokenIds: Int32Array.from(tokens), // [T]
    positions: Int32Array.from(positions), // [T]
    slotMapping: Int32Array.from(planned.flatMap((part) => slotsOf(part, blockSize))), // [T]
    qStart: startsOf(planned.map(({ count }) => count)), // [S + 1]
    blockTableStart: startsOf(blockTables.map((table) => table.length)), // [S + 1]
    blockTable: Int32Array.from(blockTables.flat()), // [blockTableStart[S]]
    numSampled: Int32Array.from(planned, ({ numSampled }) => numSampled), // [S]
    runMtp: Uint8Array.from(planned, ({ runMtp }) => Number(runMtp)), // [S]
    numDrafts: Int32Array.from(planned, ({ numDrafts }) => numDrafts), // [S]
    temperature: Float32Array.from(samplings, ({ temperature }) => temperature), // [S]
    topP: Float32Array.from(samplings, ({ topP }) => topP), // [S]
    topK: Int32Array.from(samplings, ({ topK }) => topK), // [S]
    minP: Float32Array.from(samplings, ({ minP }) => minP), // [S]
    seedLow: Uint32Array.from(samplings, ({ seed }) => Number(seed & 0xffffffffn)), // [S]
    seedHigh: Uint32Array.from(samplings, ({ seed }) => Number((seed >> 32n) & 0xffffffffn)), // [S]
    presencePenalty: Float32Array.from(samplings, ({ presencePenalty }) => presencePenalty), // [S]
    frequencyPenalty: Float32Array.from(samplings, ({ frequencyPenalty }) => frequencyPenalty), // [S]
    repetitionPenalty: Float32Array.from(samplings, ({ repetitionPenalty }) => repetitionPenalty), // [S]
    numLogprobs: Int32Array.from(samplings, ({ numLogprobs }) => numLogprobs), // [S]
    historyStart: startsOf(history.map((entries) => entries.length)), // [S + 1]
    historyIds: Int32Array.from(history.flat(), ([id]) => id), // [historyStart[S]]
    historyCounts: Int32Array.from(history.flat(), ([, count]) => count), // [historyStart[S]]
    biasStart: startsOf(bias.map((entries) => entries.length)), // [S + 1]
    biasIds: Int32Array.from(bias.flat(), ([id]) => id), // [biasStart[S]]
    biasValues: Float32Array.from(bias.flat(), ([, value]) => value), // [biasStart[S]]
    ...packMasks(planned),
    logitRows: new Int32Array(0), // [0]
    draftLogitRows: new Int32Array(0), // [0]
  };
}

/** Positions that a part writes or may write: its tokens, and the MTP module's entries after them. */
export function coveredLength({ start, count, numSampled, runMtp, numDrafts }: PlannedSequence): number {
  return start + count + (runMtp && numSampled > 0 ? Math.max(numDrafts, 1) : 0);
}

/** One outcome per planned sequence. Throws where the result does not fit the plan. */
export function unpackStep(plan: StepPlan, result: StepResult, vocabSize: number): SequenceOutcome[] {
  const numRows = plan.sequences.reduce((sum, { numSampled }) => sum + numSampled, 0);
  if (result.sampledIds.length !== numRows || result.nonFinite.length !== numRows) {
    throw new Error(`the runner returned ${result.sampledIds.length} sampled rows, not ${numRows}`);
  }
  if (result.draftStart.length !== plan.sequences.length + 1) {
    throw new Error(`the runner returned drafts of ${result.draftStart.length - 1} sequences`);
  }
  const isToken = (id: number) => id >= 0 && id < vocabSize;
  let nextRow = 0;
  return plan.sequences.map((part, index): SequenceOutcome => {
    if (part.numSampled === 0) return { kind: 'computed' };
    const firstRow = nextRow;
    nextRow += part.numSampled;
    if (result.nonFinite[firstRow] === 1) return { kind: 'non_finite' };
    const firstId = result.sampledIds[firstRow]!;
    if (!isToken(firstId)) {
      return { kind: 'failed', message: `the runner sampled token ${firstId} of a vocabulary of ${vocabSize}` };
    }
    const tokens: SampledToken[] = [];
    for (let row = firstRow; row < nextRow; row++) {
      const id = result.sampledIds[row]!;
      if (result.nonFinite[row] === 1 || !isToken(id)) break;
      const hasLogprobs = part.sequence.request.sampling.numLogprobs >= 0;
      tokens.push({ id, logprobs: hasLogprobs ? logprobsOf(result, row) : undefined });
      if (part.draftIds[row - firstRow] !== id) break; // rejected, or there is no further draft
    }
    const draftIds = [...result.draftIds.subarray(result.draftStart[index], result.draftStart[index + 1])];
    return { kind: 'sampled', tokens, draftIds: draftIds.every(isToken) ? draftIds : [] };
  });
}

function logprobsOf(result: StepResult, row: number): TokenLogprobs {
  const start = result.topStart[row]!;
  const end = result.topStart[row + 1]!;
  const ids = [...result.topIds.subarray(start, end)];
  return {
    logprob: result.sampledLogprobs[row]!,
    top: ids.map((id, index) => ({ id, logprob: result.topLogprobs[start + index]! })),
  };
}

function slotsOf({ sequence, start, count }: PlannedSequence, blockSize: number): number[] {
  return Array.from({ length: count }, (_, index) => {
    const position = start + index;
    if (position < sequence.numShared || position < sequence.numComputed) return -1;
    return sequence.blockTable[Math.floor(position / blockSize)]! * blockSize + (position % blockSize);
  });
}

/** The request's biases, with the ids that may not be sampled yet at -Infinity. */
function biasOf(sequence: Sequence): [number, number][] {
  const banned = sequence.bannedIds;
  const biases = sequence.request.sampling.logitBias.filter(([id]) => !banned.has(id));
  return [...biases, ...Array.from(banned, (id): [number, number] => [id, -Infinity])];
}

/** The masks of sequences that follow a grammar now and are sampled in this step. */
function packMasks(planned: PlannedSequence[]): Pick<StepBatch, 'maskStart' | 'masks'> {
  const words = planned.map(({ sequence, numSampled }) => (numSampled === 0 ? null : sequence.mask));
  const maskStart = startsOf(words.map((mask) => mask?.length ?? 0)); // [S + 1]
  const masks = new Int32Array(maskStart.at(-1)!); // [maskStart[S]]
  for (const [index, mask] of words.entries()) if (mask) masks.set(mask, maskStart[index]);
  return { maskStart, masks };
}

/** Running sums with a leading 0. */
function startsOf(lengths: number[]): Int32Array {
  const starts = new Int32Array(lengths.length + 1); // [S + 1]
  for (const [index, length] of lengths.entries()) starts[index + 1] = starts[index]! + length;
  return starts;
}
