import { BlockPool } from './block-pool.js';
import type { CacheEvent } from './cache-events.js';
import { PrefixCache } from './prefix-cache.js';
import type { Sequence } from './sequence.js';

export interface BlockTableOptions {
  blockSize: number;
  numBlocks: number;
  /** names the weights in the prefix cache's hashes */
  fingerprint: string;
  /** told of whatever changes in the prefix cache */
  onCacheEvent?: (event: CacheEvent) => void;
}

/** Which blocks a sequence has: taken from the prefix cache, grown, offered to the cache, given back. */
export class BlockTables {
  readonly cache: PrefixCache;
  readonly blockSize: number;
  readonly #pool: BlockPool;

  constructor({ blockSize, numBlocks, fingerprint, onCacheEvent }: BlockTableOptions) {
    this.blockSize = blockSize;
    this.#pool = new BlockPool(numBlocks);
    this.cache = new PrefixCache(this.#pool, blockSize, fingerprint, onCacheEvent);
  }

  /**
   * Gives a waiting sequence what the prefix cache has of it, where blocks for all of its tokens and numReserved more are
   * to be had. The last token is always computed, because its row is sampled; where its block came from the cache it is
   * computed without being written.
   *
   * wantsMtp: whether the sequence is to run the MTP module, given the cached tokens that it would lose by that
   */
  takePrefix(sequence: Sequence, numReserved: number, wantsMtp: (numLost: number) => boolean): boolean {
    const { blockSize, cache } = this;
    const { tokens, rootHash, blockHashes } = sequence;
    cache.extendHashes(blockHashes, rootHash, tokens);
    const { blockIds, numWithMtp } = cache.findPrefix(blockHashes, rootHash, tokens);
    const runsMtp = wantsMtp(blockSize * (blockIds.length - numWithMtp));
    const blockTable = runsMtp ? blockIds.slice(0, numWithMtp) : blockIds;
    cache.takeFound(blockTable);
    const numNeeded = Math.ceil(tokens.length / blockSize) - blockTable.length;
    if (numNeeded + numReserved > cache.numAvailable) {
      cache.release(blockTable);
      return false;
    }
    sequence.blockTable = blockTable;
    sequence.numShared = blockTable.length * blockSize;
    sequence.numComputed = Math.min(sequence.numShared, tokens.length - 1);
    sequence.numPublished = blockTable.length;
    sequence.runsMtp = runsMtp;
    if (runsMtp) sequence.numMtp = Math.max(1, sequence.numShared);
    return true;
  }

  /** Blocks that a sequence lacks for so many tokens more. */
  numMissing({ numComputed, blockTable }: Sequence, numTokens: number): number {
    return Math.ceil((numComputed + numTokens) / this.blockSize) - blockTable.length;
  }

  /** Gives a sequence blocks for so many tokens more, as far as there are any. Returns how many tokens have room. */
  grow(sequence: Sequence, numTokens: number): number {
    const { blockTable, numComputed } = sequence;
    const count = Math.min(this.numMissing(sequence, numTokens), this.cache.numAvailable);
    for (let taken = 0; taken < count; taken++) blockTable.push(this.cache.take()!);
    return Math.min(numTokens, blockTable.length * this.blockSize - numComputed);
  }

  /**
   * Offers the full computed blocks to the prefix cache. To be called only when a row came out finite, which vouches for
   * every latent it attended to; so the blocks of a prefill are published at its end, not chunk by chunk.
   */
  publish(sequence: Sequence): void {
    const { blockSize, cache } = this;
    const { tokens, rootHash, blockHashes, blockTable, numComputed, numMtp } = sequence;
    const numFull = Math.floor(numComputed / blockSize);
    if (sequence.numPublished >= numFull) return;
    cache.extendHashes(blockHashes, rootHash, tokens);
    while (sequence.numPublished < numFull) {
      const index = sequence.numPublished++;
      const hasMtp = numMtp >= (index + 1) * blockSize;
      cache.publish(blockTable[index]!, index, blockHashes, rootHash, tokens, hasMtp);
    }
  }

  release(sequence: Sequence): void {
    this.cache.release(sequence.blockTable);
    sequence.reset();
  }

  counts(): { numBlocks: number; numFreeBlocks: number; numCachedBlocks: number; blockSize: number } {
    const { numBlocks, numFree } = this.#pool;
    return { numBlocks, numFreeBlocks: numFree, numCachedBlocks: this.cache.numIdle, blockSize: this.blockSize };
  }

  /** The counts alone: cheap enough for every idle moment. */
  checkCounts(isIdle: boolean): void {
    this.cache.checkCounts();
    if (isIdle && this.#pool.numReferenced !== 0) {
      throw new Error(`block invariant broken: ${this.#pool.numReferenced} blocks referenced by nobody`);
    }
  }

  /** Each block is referenced as often as it stands in the tables of these sequences, which are all that are open. */
  checkReferences(sequences: Iterable<Sequence>): void {
    this.cache.checkInvariant();
    const references = new Int32Array(this.#pool.numBlocks); // [num_blocks]
    for (const sequence of sequences) {
      for (const blockId of sequence.blockTable) references[blockId]!++;
      if (sequence.status === 'waiting' && sequence.blockTable.length > 0) {
        throw new Error(`block invariant broken: waiting sequence ${sequence.id} owns blocks`);
      }
    }
    for (const [blockId, count] of references.entries()) {
      if (this.#pool.references(blockId) !== count) {
        throw new Error(
          `block invariant broken: block ${blockId} has ${this.#pool.references(blockId)} references, ${count} users`,
        );
      }
      if (count > 1 && !this.cache.isPublished(blockId)) {
        throw new Error(`block invariant broken: unpublished block ${blockId} is shared`);
      }
    }
  }
}
