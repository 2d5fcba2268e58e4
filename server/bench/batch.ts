/** Step batches of a benchmark: greedy sequences of random tokens in blocks of their own. */
import type { StepBatch } from '../engine/step-batch.js';

/** One token of each sequence at position `context`; sequence s owns blocks s * blocksPerSequence and those after. */
export function decodeBatch(
  numSequences: number,
  context: number,
  vocabSize: number,
  blockSize: number,
  blocksPerSequence: number,
  seed: number,
): StepBatch {
  const numBlocks = Math.floor(context / blockSize) + 1;
  const blocks = ints(numSequences * numBlocks, (index) => {
    return Math.floor(index / numBlocks) * blocksPerSequence + (index % numBlocks);
  });
  return makeBatch({
    tokenIds: ints(numSequences, (index) => tokenOf(seed * numSequences + index, vocabSize)),
    positions: ints(numSequences, () => context),
    slotMapping: ints(numSequences, (index) => index * blocksPerSequence * blockSize + context),
    qStart: ints(numSequences + 1, (index) => index),
    blockTableStart: ints(numSequences + 1, (index) => index * numBlocks),
    blockTable: blocks,
  });
}

/** `count` tokens of one sequence from position `first` on, in blocks from `firstBlock` on. */
export function prefillBatch(
  first: number,
  count: number,
  firstBlock: number,
  vocabSize: number,
  blockSize: number,
  seed: number,
): StepBatch {
  const numBlocks = Math.ceil((first + count) / blockSize);
  return makeBatch({
    tokenIds: ints(count, (index) => tokenOf(seed * count + index, vocabSize)),
    positions: ints(count, (index) => first + index),
    slotMapping: ints(count, (index) => firstBlock * blockSize + first + index),
    qStart: Int32Array.of(0, count),
    blockTableStart: Int32Array.of(0, numBlocks),
    blockTable: ints(numBlocks, (index) => firstBlock + index),
  });
}

type Tokens = Pick<StepBatch, 'tokenIds' | 'positions' | 'slotMapping' | 'qStart' | 'blockTableStart' | 'blockTable'>;

/** The last token of every sequence is sampled. */
function makeBatch(tokens: Tokens): StepBatch {
  const count = tokens.qStart.length - 1; // S
  return {
    ...tokens,
    numSampled: ints(count, () => 1), // [S]
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
  };
}

/** Different tokens choose different experts. */
function tokenOf(index: number, vocabSize: number): number {
  return (index * 7919 + 13) % vocabSize;
}

function ints(length: number, valueOf: (index: number) => number): Int32Array {
  return Int32Array.from({ length }, (_, index) => valueOf(index));
}
