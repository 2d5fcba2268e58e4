import type { TokenLogprobs } from './request.js';
import { StepArrays } from './step-arrays.js';
import type { StepBatch, StepResult } from './step-batch.js';
import type { PlannedSequence, SampledToken, SequenceOutcome, StepPlan } from './step-plan.js';

const NOTHING: ReadonlyMap<number, number> = new Map();

/**
 * Lays a plan out as flat arrays. Tokens whose latents are there already get slot -1; those that the step before samples
 * are named by its row.
 */
export function packStep(plan: StepPlan, blockSize: number): StepBatch {
  const planned = plan.sequences;
  const arrays = new StepArrays();
  const size = planned.length; // S
  const qStart = startsOf(arrays, size, (index) => planned[index]!.count);
  const blockTableStart = startsOf(arrays, size, (index) => Math.ceil(coveredLength(planned[index]!) / blockSize));
  const tokenIds = arrays.int32(qStart[size]!); // [T]
  const positions = arrays.int32(qStart[size]!); // [T]
  const slotMapping = arrays.int32(qStart[size]!); // [T]
  const blockTable = arrays.int32(blockTableStart[size]!); // [blockTableStart[S]]
  for (let index = 0; index < size; index++) {
    const { sequence, start, count, draftIds } = planned[index]!;
    const { tokens, blockTable: blocks, numShared, numComputed } = sequence;
    const numTokens = count - draftIds.length;
    for (let row = 0, to = qStart[index]!; row < count; row++, to++) {
      const position = start + row;
      const isThere = position < numShared || position < numComputed;
      tokenIds[to] = row < numTokens ? (tokens[position] ?? rowName(planned[index]!)) : draftIds[row - numTokens]!;
      positions[to] = position;
      slotMapping[to] = isThere ? -1 : blocks[Math.floor(position / blockSize)]! * blockSize + (position % blockSize);
    }
    const first = blockTableStart[index]!;
    for (let to = first; to < blockTableStart[index + 1]!; to++) blockTable[to] = blocks[to - first]!;
  }
  return {
    tokenIds,
    positions,
    slotMapping,
    qStart,
    blockTableStart,
    blockTable,
    ...packSampling(arrays, planned),
    ...packHistory(arrays, planned),
    ...packBias(arrays, planned),
    ...packMasks(arrays, planned),
    logitRows: arrays.int32(0), // [0]
    draftLogitRows: arrays.int32(0), // [0]
  };
}

/** Stands for a token that the step before samples. */
function rowName({ sequence, rowBefore }: PlannedSequence): number {
  if (rowBefore === undefined)
    throw new Error(`sequence ${sequence.id} has no token there, and no row of a step before`);
  return -1 - rowBefore;
}

/** What a sequence has one value of. One loop: this is run every step. */
function packSampling(arrays: StepArrays, planned: readonly PlannedSequence[]) {
  const size = planned.length; // S
  const numSampled = arrays.int32(size); // [S]
  const runMtp = arrays.uint8(size); // [S]
  const numDrafts = arrays.int32(size); // [S]
  const temperature = arrays.float32(size); // [S]
  const topP = arrays.float32(size); // [S]
  const topK = arrays.int32(size); // [S]
  const minP = arrays.float32(size); // [S]
  const seedLow = arrays.uint32(size); // [S]
  const seedHigh = arrays.uint32(size); // [S]
  const presencePenalty = arrays.float32(size); // [S]
  const frequencyPenalty = arrays.float32(size); // [S]
  const repetitionPenalty = arrays.float32(size); // [S]
  const numLogprobs = arrays.int32(size); // [S]
  for (let index = 0; index < size; index++) {
    const part = planned[index]!;
    const { sampling } = part.sequence.request;
    numSampled[index] = part.numSampled;
    runMtp[index] = Number(part.runMtp);
    numDrafts[index] = part.numDrafts;
    temperature[index] = sampling.temperature;
    topP[index] = sampling.topP;
    topK[index] = sampling.topK;
    minP[index] = sampling.minP;
    seedLow[index] = Number(sampling.seed & 0xffffffffn);
    seedHigh[index] = Number((sampling.seed >> 32n) & 0xffffffffn);
    presencePenalty[index] = sampling.presencePenalty;
    frequencyPenalty[index] = sampling.frequencyPenalty;
    repetitionPenalty[index] = sampling.repetitionPenalty;
    numLogprobs[index] = sampling.numLogprobs;
  }
  return {
    ...{ numSampled, runMtp, numDrafts, temperature, topP, topK, minP, seedLow, seedHigh },
    ...{ presencePenalty, frequencyPenalty, repetitionPenalty, numLogprobs },
  };
}

/** The tokens of sampled sequences with a penalty. */
function packHistory(arrays: StepArrays, planned: readonly PlannedSequence[]) {
  const historyOf = (index: number) => (planned[index]!.numSampled === 0 ? NOTHING : planned[index]!.sequence.history);
  const historyStart = startsOf(arrays, planned.length, (index) => historyOf(index).size);
  const historyIds = arrays.int32(historyStart[planned.length]!); // [historyStart[S]]
  const historyCounts = arrays.int32(historyIds.length); // [historyStart[S]]
  for (let index = 0, to = 0; index < planned.length; index++) {
    for (const [id, count] of historyOf(index)) {
      historyIds[to] = id;
      historyCounts[to++] = count;
    }
  }
  return { historyStart, historyIds, historyCounts };
}

function packBias(arrays: StepArrays, planned: readonly PlannedSequence[]) {
  const bias = planned.map((part) => (part.numSampled === 0 ? [] : biasOf(part))); // [S, biases]
  const biasStart = startsOf(arrays, planned.length, (index) => bias[index]!.length);
  const biasIds = arrays.int32(biasStart[planned.length]!); // [biasStart[S]]
  const biasValues = arrays.float32(biasIds.length); // [biasStart[S]]
  for (let index = 0, to = 0; index < planned.length; index++) {
    for (const [id, value] of bias[index]!) {
      biasIds[to] = id;
      biasValues[to++] = value;
    }
  }
  return { biasStart, biasIds, biasValues };
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

/** The request's biases, with the ids that may not be sampled yet at -Infinity. */
function biasOf({ sequence, start, count, draftIds }: PlannedSequence): [number, number][] {
  const banned = sequence.bannedIdsAfter(start + count - draftIds.length - sequence.tokens.length);
  const { logitBias } = sequence.request.sampling;
  if (banned.size === 0) return logitBias;
  const biases = logitBias.filter(([id]) => !banned.has(id));
  return [...biases, ...Array.from(banned, (id): [number, number] => [id, -Infinity])];
}

/** The masks of sequences that follow a grammar now and are sampled in this step. */
function packMasks(arrays: StepArrays, planned: readonly PlannedSequence[]): Pick<StepBatch, 'maskStart' | 'masks'> {
  const words = planned.map(({ sequence, numSampled }) => (numSampled === 0 ? null : sequence.mask)); // [S]
  const maskStart = startsOf(arrays, planned.length, (index) => words[index]?.length ?? 0);
  const masks = arrays.int32(maskStart[planned.length]!); // [maskStart[S]]
  for (let index = 0; index < words.length; index++) if (words[index]) masks.set(words[index]!, maskStart[index]);
  return { maskStart, masks };
}

/** Running sums of lengths, with a leading 0. */
function startsOf(arrays: StepArrays, size: number, lengthOf: (index: number) => number): Int32Array {
  const starts = arrays.int32(size + 1); // [S + 1]
  for (let index = 0; index < size; index++) starts[index + 1] = starts[index]! + lengthOf(index);
  return starts;
}
