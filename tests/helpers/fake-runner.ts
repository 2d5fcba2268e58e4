import assert from 'node:assert/strict';
import { setImmediate as turn } from 'node:timers/promises';
import type { StepRunner } from '../../server/engine/addon.js';
import type { EngineRequest } from '../../server/engine/request.js';
import type { StepBatch, StepResult } from '../../server/engine/step-batch.js';

export interface FakeRunnerOptions {
  vocabSize: number;
  blockSize: number;
  numBlocks: number;
  maxStepTokens: number;
  maxNumSeqs: number;
}

const EMPTY = -1;
const NAN = -2;

/**
 * A runner whose latent cache holds token ids and whose "model" is a hash of the whole prefix as read back through
 * the block table: any error in chunking, block tables, sharing, preemption or positions changes its output. It also
 * asserts what a native runner relies on: budgets, slots, and that no block is written that another sequence reads.
 */
export class FakeRunner implements StepRunner {
  readonly options: FakeRunnerOptions;
  readonly #cache: Int32Array; // [num_blocks, block_size]
  /** a step with this token in it is refused */
  throwOn = -1;
  /** the next steps come out non-finite, and so does whatever reads what they wrote */
  isPoisoned = false;
  /** every step is refused */
  isBroken = false;
  numSteps = 0;
  maxSequences = 0;

  constructor(options: FakeRunnerOptions) {
    this.options = options;
    this.#cache = new Int32Array(options.numBlocks * options.blockSize).fill(EMPTY);
  }

  async step(batch: StepBatch): Promise<StepResult> {
    await turn();
    return this.stepNow(batch);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }

  stepNow(batch: StepBatch): StepResult {
    if (this.isBroken) throw new Error('the fake runner is broken');
    if (batch.tokenIds.includes(this.throwOn)) throw new Error('the fake runner refuses this token');
    const numSequences = batch.numSampled.length;
    assert.ok(numSequences > 0 && numSequences <= this.options.maxNumSeqs);
    assert.ok(batch.tokenIds.length <= this.options.maxStepTokens);
    this.numSteps++;
    this.maxSequences = Math.max(this.maxSequences, numSequences);
    this.#checkSharing(batch);
    const prefixes = Array.from({ length: numSequences }, (_, index) => this.#writeAndRead(batch, index));
    const rows = prefixes.flatMap((prefix, index) => (batch.numSampled[index] === 1 ? [{ prefix, index }] : []));
    const isNan = rows.map(({ prefix }) => prefix.includes(NAN));
    const sampled = rows.map(({ prefix, index }, row) =>
      isNan[row] ? -1 : sampleFromBatch(prefix, batch, index, this.options.vocabSize),
    );
    return {
      sampledIds: Int32Array.from(sampled), // [R]
      sampledLogprobs: Float32Array.from(sampled, (id) => -id / 8), // [R]
      topStart: Int32Array.from({ length: rows.length + 1 }, (_, row) => row), // [R + 1]
      topIds: Int32Array.from(sampled), // [R]
      topLogprobs: Float32Array.from(sampled, (id) => -id / 8), // [R]
      nonFinite: Uint8Array.from(isNan, Number), // [R]
      logits: new Float32Array(0), // [0]
      draftLogits: new Float32Array(0), // [0]
      stepMicros: 1,
    };
  }

  /** No slot is written twice, and no block is written that stands in another sequence's table. */
  #checkSharing(batch: StepBatch): void {
    const { blockSize } = this.options;
    const users = new Map<number, Set<number>>();
    for (let index = 0; index < batch.numSampled.length; index++) {
      for (const blockId of blockTableOf(batch, index)) {
        users.set(blockId, (users.get(blockId) ?? new Set()).add(index));
      }
    }
    const written = new Set<number>();
    for (const slot of batch.slotMapping) {
      if (slot === -1) continue;
      assert.ok(!written.has(slot), `slot ${slot} is written twice`);
      written.add(slot);
      assert.equal(
        users.get(Math.floor(slot / blockSize))?.size,
        1,
        `slot ${slot} lies in a block of several sequences`,
      );
    }
  }

  /** Writes one sequence's tokens and returns its whole prefix as the cache holds it. */
  #writeAndRead(batch: StepBatch, index: number): number[] {
    const { blockSize } = this.options;
    const table = blockTableOf(batch, index);
    const slotOf = (position: number) => table[Math.floor(position / blockSize)]! * blockSize + (position % blockSize);
    let last = -1;
    assert.ok(batch.qStart[index + 1]! > batch.qStart[index]!, 'every sequence has a token');
    for (let token = batch.qStart[index]!; token < batch.qStart[index + 1]!; token++) {
      const position = batch.positions[token]!;
      const slot = batch.slotMapping[token]!;
      assert.ok(last === -1 || position === last + 1, 'positions run on');
      last = position;
      if (slot === -1)
        assert.equal(this.#cache[slotOf(position)], batch.tokenIds[token], 'slot -1: it is there already');
      else {
        assert.equal(slot, slotOf(position));
        this.#cache[slot] = this.isPoisoned ? NAN : batch.tokenIds[token]!;
      }
    }
    assert.equal(table.length, Math.ceil((last + 1) / blockSize), 'the block table covers the positions exactly');
    return Array.from({ length: last + 1 }, (_, position) => this.#cache[slotOf(position)]!);
  }
}

function blockTableOf(batch: StepBatch, index: number): Int32Array {
  return batch.blockTable.subarray(batch.blockTableStart[index], batch.blockTableStart[index + 1]);
}

function sampleFromBatch(prefix: number[], batch: StepBatch, index: number, vocabSize: number): number {
  const [historyStart, historyEnd] = [batch.historyStart[index]!, batch.historyStart[index + 1]!];
  let numCounted = -1;
  if (historyEnd > historyStart) {
    const ids = batch.historyIds.subarray(historyStart, historyEnd);
    assert.deepEqual(new Set(ids), new Set(prefix), 'the history holds each id of the sequence');
    assert.equal(new Set(ids).size, ids.length, 'the history holds each id once');
    numCounted = batch.historyCounts.subarray(historyStart, historyEnd).reduce((sum, count) => sum + count, 0);
  }
  const banned = new Set<number>();
  for (let entry = batch.biasStart[index]!; entry < batch.biasStart[index + 1]!; entry++) {
    if (batch.biasValues[entry] === -Infinity) banned.add(batch.biasIds[entry]!);
  }
  const seed = batch.temperature[index] === 0 ? 0 : batch.seedLow[index]! ^ batch.seedHigh[index]!;
  return pick(prefix, seed, numCounted, banned, vocabSize);
}

function pick(
  prefix: readonly number[],
  seed: number,
  numCounted: number,
  banned: ReadonlySet<number>,
  vocabSize: number,
): number {
  let hash = (0x811c9dc5 ^ seed ^ Math.imul(numCounted, 0x9e3779b1)) >>> 0;
  for (const id of prefix) hash = (Math.imul(hash ^ id, 0x01000193) ^ (hash >>> 13)) >>> 0;
  let id = hash % vocabSize;
  while (banned.has(id)) id = (id + 1) % vocabSize;
  return id;
}

/** What the fake model generates for a request with nothing around it: the oracle of the scheduler's tests. */
export function expectedTokens(request: EngineRequest, vocabSize: number, maxContext: number): number[] {
  const { sampling, promptIds } = request;
  const tokens = [...promptIds];
  const hasPenalty =
    sampling.presencePenalty !== 0 || sampling.frequencyPenalty !== 0 || sampling.repetitionPenalty !== 1;
  const seed = sampling.temperature === 0 ? 0 : Number(sampling.seed & 0xffffffffn) ^ Number(sampling.seed >> 32n);
  while (tokens.length < Math.min(promptIds.length + sampling.maxTokens, maxContext)) {
    const numCompletion = tokens.length - promptIds.length;
    const banned = new Set(numCompletion < sampling.minTokens ? sampling.stopTokenIds : []);
    for (const [id, bias] of sampling.logitBias) if (bias === -Infinity) banned.add(id);
    const id = pick(tokens, seed, hasPenalty ? numCompletion : -1, banned, vocabSize);
    tokens.push(id);
    if (sampling.stopTokenIds.includes(id)) break;
  }
  return tokens.slice(promptIds.length);
}

export const NO_MARKERS = { thinkStart: -1, thinkEnd: -1, toolCallsBegin: -1, toolCallsEnd: -1 };

/** A greedy request; override what the test is about. */
export function makeRequest(
  requestId: string,
  promptIds: number[],
  sampling: Partial<EngineRequest['sampling']> = {},
  rest: Partial<EngineRequest> = {},
): EngineRequest {
  return {
    requestId,
    promptIds,
    sampling: {
      temperature: 0,
      topP: 1,
      topK: 0,
      minP: 0,
      seed: 0n,
      presencePenalty: 0,
      frequencyPenalty: 0,
      repetitionPenalty: 1,
      logitBias: [],
      stopTokenIds: [],
      minTokens: 0,
      maxTokens: 8,
      numLogprobs: -1,
      ...sampling,
    },
    markers: NO_MARKERS,
    startPhase: 'answer',
    cacheSalt: '',
    ...rest,
  };
}
