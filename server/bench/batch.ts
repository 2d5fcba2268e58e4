/** Step batches of a benchmark: greedy sequences of random tokens in blocks of their own, each sampled once. */
import { plainBatch } from '../engine/plain-batch.js';
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
  return plainBatch({
    tokenIds: ints(numSequences, (index) => tokenOf(seed * numSequences + index, vocabSize)),
    positions: ints(numSequences, () => context),
    slotMapping: ints(numSequences, (index) => index * blocksPerSequence * blockSize + context),
    qStart: ints(numSequences + 1, (index) => index),
    blockTableStart: ints(numSequences + 1, (index) => index * numBlocks),
    blockTable: blocks,
    numSampled: ints(numSequences, () => 1),
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
  return plainBatch({
    tokenIds: ints(count, (index) => tokenOf(seed * count + index, vocabSize)),
    positions: ints(count, (index) => first + index),
    slotMapping: ints(count, (index) => firstBlock * blockSize + first + index),
    qStart: Int32Array.of(0, count),
    blockTableStart: Int32Array.of(0, numBlocks),
    blockTable: ints(numBlocks, (index) => firstBlock + index),
    numSampled: Int32Array.of(1),
  });
}

/** Different tokens choose different experts. */
function tokenOf(index: number, vocabSize: number): number {
  return (index * 7919 + 13) % vocabSize;
}

function ints(length: number, valueOf: (index: number) => number): Int32Array {
  return Int32Array.from({ length }, (_, index) => valueOf(index));
}
