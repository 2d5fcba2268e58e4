import assert from 'node:assert/strict';
import { setImmediate as turn } from 'node:timers/promises';
import type { StepRunner } from '../../server/engine/addon.js';
import { GREEDY, NO_MARKERS, type EngineRequest } from '../../server/engine/request.js';
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
/** what a draft that is not confirmed leaves in the MTP module's cache */
const PROVISIONAL = -3;

/**
 * A runner whose latent cache holds token ids and whose "model" is a hash of the whole prefix as read back through
 * the block table: any error in chunking, block tables, sharing, preemption or positions changes its output. It also
 * asserts what a native runner relies on: budgets, slots, and that no block is written that another sequence reads.
 *
 * Its MTP module keeps for each position a hash of the prefix that its entry is made from, and drafts only where every
 * entry is there and right. Drafts are sometimes what the target will sample, a hash says when.
 */
export class FakeRunner implements StepRunner {
  readonly options: FakeRunnerOptions;
  readonly #cache: Int32Array; // [num_blocks, block_size]
  readonly #mtpCache: Int32Array; // [num_blocks, block_size] hashes of prefixes
  #sampledBefore: number[] = []; // [rows of the step before]
  #numUnderWay = 0;
  /** a step with this token in it is refused */
  throwOn = -1;
  /** the next steps come out non-finite, and so does whatever reads what they wrote */
  isPoisoned = false;
  /** every step is refused */
  isBroken = false;
  /** every step is refused, as by a device that is lost */
  isLost = false;
  numSteps = 0;
  /** of them, those with a token that the step before has sampled */
  numAhead = 0;
  maxSequences = 0;
  /** drafts of each sequence that got any, in order of the steps */
  readonly drafted: number[][] = [];

  constructor(options: FakeRunnerOptions) {
    this.options = options;
    this.#cache = new Int32Array(options.numBlocks * options.blockSize).fill(EMPTY);
    this.#mtpCache = new Int32Array(options.numBlocks * options.blockSize).fill(EMPTY);
  }

  async step(batch: StepBatch): Promise<StepResult> {
    assert.ok(++this.#numUnderWay <= 2, 'at most two steps are under way');
    await turn();
    this.#numUnderWay--;
    return this.stepNow(batch);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }

  stepNow(given: StepBatch): StepResult {
    const batch = { ...given, tokenIds: this.#resolve(given) };
    this.#sampledBefore = [];
    const result = this.#compute(batch);
    this.#sampledBefore = [...result.sampledIds];
    return result;
  }

  /** Token ids below 0 name rows of the step before. */
  #resolve({ tokenIds, qStart, numSampled, runMtp }: StepBatch): Int32Array {
    if (tokenIds.some((id) => id < 0)) this.numAhead++;
    const known = Int32Array.from(tokenIds); // [T]
    for (let index = 0; index < numSampled.length; index++) {
      for (let token = qStart[index]!; token < qStart[index + 1]!; token++) {
        if (tokenIds[token]! >= 0) continue;
        const isOnlySampled = token === qStart[index + 1]! - 1 && numSampled[index] === 1 && runMtp[index] === 0;
        assert.ok(isOnlySampled, 'a row of the step before stands for the only sampled token');
        const row = -1 - tokenIds[token]!;
        if (row >= this.#sampledBefore.length) throw new Error(`the step before has no row ${row}`);
        known[token] = Math.max(0, this.#sampledBefore[row]!);
      }
    }
    return known;
  }

  #compute(batch: StepBatch): StepResult {
    if (this.isLost) throw Object.assign(new Error('the fake device is lost'), { code: 'DEVICE_LOST' });
    if (this.isBroken) throw new Error('the fake runner is broken');
    if (batch.tokenIds.includes(this.throwOn)) throw new Error('the fake runner refuses this token');
    const numSequences = batch.numSampled.length;
    assert.ok(numSequences > 0 && numSequences <= this.options.maxNumSeqs);
    assert.ok(batch.tokenIds.length <= this.options.maxStepTokens);
    this.numSteps++;
    this.maxSequences = Math.max(this.maxSequences, numSequences);
    this.#checkSharing(batch);
    const prefixes = Array.from({ length: numSequences }, (_, index) => this.#writeAndRead(batch, index));
    const rows = prefixes.flatMap((prefix, index) => {
      const count = batch.numSampled[index]!;
      return Array.from({ length: count }, (_, row) => {
        const length = prefix.length - count + 1 + row;
        return { prefix: prefix.slice(0, length), index, drafts: prefix.slice(prefix.length - count + 1, length) };
      });
    });
    const isNan = rows.map(({ prefix }) => prefix.includes(NAN));
    const sampled = rows.map(({ prefix, index, drafts }, row) =>
      isNan[row] ? -1 : sampleFromBatch(prefix, drafts, batch, index, this.options.vocabSize),
    );
    const drafts = prefixes.map((prefix, index) => {
      const row = batch.numSampled.subarray(0, index).reduce((sum, count) => sum + count, 0);
      return this.#runMtp(batch, index, prefix, sampled.slice(row, row + batch.numSampled[index]!));
    });
    const draftEnds = drafts.map((_, index) => drafts.slice(0, index + 1).flat().length);
    return {
      sampledIds: Int32Array.from(sampled), // [R]
      sampledLogprobs: Float32Array.from(sampled, (id) => -id / 8), // [R]
      topStart: Int32Array.from({ length: rows.length + 1 }, (_, row) => row), // [R + 1]
      topIds: Int32Array.from(sampled), // [R]
      topLogprobs: Float32Array.from(sampled, (id) => -id / 8), // [R]
      nonFinite: Uint8Array.from(isNan, Number), // [R]
      logits: new Float32Array(0), // [0]
      draftLogits: new Float32Array(0), // [0]
      draftStart: Int32Array.from([0, ...draftEnds]), // [S + 1]
      draftIds: Int32Array.from(drafts.flat()), // [draftStart[S]]
      stepMicros: 1,
      draftMicros: 0,
      deviceMicros: 1,
      idleMicros: 0,
    };
  }

  /** The content of a block, and whether the MTP module's entries of all its positions belong to the prefix before. */
  readBlock(blockId: number, prefix: number[]): { tokenIds: number[]; hasMtp: boolean } {
    const { blockSize } = this.options;
    const slots = Array.from({ length: blockSize }, (_, offset) => blockId * blockSize + offset);
    const start = prefix.length - blockSize;
    return {
      tokenIds: slots.map((slot) => this.#cache[slot]!),
      hasMtp: slots.every(
        (slot, offset) => start + offset === 0 || this.#mtpCache[slot] === entryOf(prefix, start + offset),
      ),
    };
  }

  /** Makes one sequence's entries and its drafts; asserts that what it drafts from has no hole. */
  #runMtp(batch: StepBatch, index: number, prefix: number[], sampled: number[]): number[] {
    const numDrafts = batch.numDrafts[index]!;
    if (batch.runMtp[index] === 0) {
      assert.equal(numDrafts, 0, 'drafts come from the MTP module');
      return [];
    }
    const { blockSize, vocabSize } = this.options;
    const table = blockTableOf(batch, index);
    const slotOf = (position: number) => {
      assert.ok(position < table.length * blockSize, 'the block table covers what the MTP module writes');
      return table[Math.floor(position / blockSize)]! * blockSize + (position % blockSize);
    };
    const start = batch.positions[batch.qStart[index]!]!;
    const numOwn = prefix.length - Math.max(0, sampled.length - 1); // confirmed before this step
    let numConfirmed = numOwn;
    while (numConfirmed < prefix.length && prefix[numConfirmed] === sampled[numConfirmed - numOwn]) numConfirmed++;
    const last = sampled.length === 0 ? EMPTY : sampled[numConfirmed - numOwn]!;
    const confirmed = [...prefix.slice(0, numConfirmed), ...(last >= 0 ? [last] : [])];
    for (let position = start + 1; position < confirmed.length; position++) {
      this.#mtpCache[slotOf(position)] = entryOf(confirmed, position);
    }
    if (last < 0) return [];
    for (let position = 1; position < confirmed.length; position++) {
      assert.equal(this.#mtpCache[slotOf(position)], entryOf(confirmed, position), `entry ${position} is there`);
    }
    const drafts: number[] = [];
    for (let depth = 0; depth < numDrafts; depth++) {
      if (depth > 0) this.#mtpCache[slotOf(confirmed.length + depth - 1)] = PROVISIONAL;
      const before = [...sampled.slice(0, confirmed.length - numOwn), ...drafts];
      const right = sampleFromBatch([...confirmed, ...drafts], before, batch, index, vocabSize);
      drafts.push(hashOf([...confirmed, ...drafts]) % 4 === 0 ? (right + 1) % vocabSize : right);
    }
    if (numDrafts > 0) this.drafted.push(drafts);
    return drafts;
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
    const numProvisional =
      batch.runMtp[index] === 1 && batch.numSampled[index]! > 0 ? Math.max(1, batch.numDrafts[index]!) : 0;
    const length = last + 1 + numProvisional;
    assert.equal(table.length, Math.ceil(length / blockSize), 'the block table covers the positions exactly');
    return Array.from({ length: last + 1 }, (_, position) => this.#cache[slotOf(position)]!);
  }
}

function blockTableOf(batch: StepBatch, index: number): Int32Array {
  return batch.blockTable.subarray(batch.blockTableStart[index], batch.blockTableStart[index + 1]);
}

/** The entry of the MTP module at a position: made from its token, and from the hidden state before it. */
function entryOf(prefix: readonly number[], position: number): number {
  return hashOf(prefix.slice(0, position + 1));
}

function hashOf(prefix: readonly number[]): number {
  let hash = 0x2545f491;
  for (const id of prefix) hash = Math.imul(hash ^ id, 0x01000193) ^ (hash >>> 15);
  return (hash >>> 1) & 0x3fffffff;
}

/** `drafts`: the end of the prefix that the batch's history does not hold. */
function sampleFromBatch(
  prefix: number[],
  drafts: number[],
  batch: StepBatch,
  index: number,
  vocabSize: number,
): number {
  const [historyStart, historyEnd] = [batch.historyStart[index]!, batch.historyStart[index + 1]!];
  let numCounted = -1;
  if (historyEnd > historyStart) {
    const ids = batch.historyIds.subarray(historyStart, historyEnd);
    const seen = prefix.slice(0, prefix.length - drafts.length);
    assert.deepEqual(new Set(ids), new Set(seen), 'the history holds each id of the sequence');
    assert.equal(new Set(ids).size, ids.length, 'the history holds each id once');
    numCounted = batch.historyCounts.subarray(historyStart, historyEnd).reduce((sum, count) => sum + count, 0);
    numCounted += drafts.length;
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
    sampling: { ...GREEDY, maxTokens: 8, ...sampling },
    markers: NO_MARKERS,
    startPhase: 'answer',
    cacheSalt: '',
    ...rest,
  };
}
