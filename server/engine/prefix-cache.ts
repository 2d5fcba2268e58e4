import { createHash } from 'node:crypto';
import { LRUCache } from 'lru-cache';
import type { BlockPool } from './block-pool.js';
import type { CacheEvent } from './cache-events.js';

/** What a published block holds. */
export interface CachedBlock {
  blockId: number;
  hash: string;
  parentHash: string;
  tokenIds: Int32Array; // [block_size]
  /** whether all entries of the MTP module are there too */
  hasMtp: boolean;
}

/**
 * Which content a block holds, and in which order blocks that hold content but have no reference are evicted. All
 * blocks are taken and released through here.
 *
 * The hash of a block is a chain: SHA-256 over the parent block's hash and the block's token ids; the first parent
 * is SHA-256 over the model's fingerprint and the request's salt. Only full, computed blocks with finite rows are
 * published, and a published block is never written again.
 *
 * Content may be published without the MTP module's entries, and again with them: the later block then replaces the
 * earlier one, which is freed when its last user releases it.
 */
export class PrefixCache {
  readonly #pool: BlockPool;
  readonly #blockSize: number;
  readonly #fingerprint: string;
  readonly #byHash = new Map<string, CachedBlock>();
  readonly #byBlock = new Map<number, CachedBlock>();
  readonly #onChange: (event: CacheEvent) => void;
  /** published blocks without references, least recently used first out */
  readonly #idle: LRUCache<number, CachedBlock>;

  constructor(
    pool: BlockPool,
    blockSize: number,
    fingerprint: string,
    onChange: (event: CacheEvent) => void = () => {},
  ) {
    this.#pool = pool;
    this.#onChange = onChange;
    this.#blockSize = blockSize;
    this.#fingerprint = fingerprint;
    this.#idle = new LRUCache({ max: pool.numBlocks });
  }

  /** Blocks that hold content and nothing else. */
  get numIdle(): number {
    return this.#idle.size;
  }

  /** Blocks that can be taken now. */
  get numAvailable(): number {
    return this.#pool.numFree + this.#idle.size;
  }

  rootHash(salt: string): string {
    return createHash('sha256').update(`${this.#fingerprint}\n${salt}`).digest('hex');
  }

  /** Appends to `hashes` the chain's hashes of the full blocks of `tokens` that it does not have yet. */
  extendHashes(hashes: string[], rootHash: string, tokens: readonly number[]): void {
    const numFull = Math.floor(tokens.length / this.#blockSize);
    while (hashes.length < numFull) {
      const parent = hashes.at(-1) ?? rootHash;
      const ids = this.#blockTokens(tokens, hashes.length);
      const bytes = new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength);
      hashes.push(createHash('sha256').update(parent).update(bytes).digest('hex'));
    }
  }

  /**
   * The longest run of published blocks for `tokens`, and how many of its first ones have the MTP module's entries.
   * `hashes` are those of all its full blocks. A hit counts only where the stored token ids and the stored parent are
   * the same too.
   */
  findPrefix(
    hashes: readonly string[],
    rootHash: string,
    tokens: readonly number[],
  ): { blockIds: number[]; numWithMtp: number } {
    const blockIds: number[] = []; // [num_hit]
    let numWithMtp = 0;
    for (const [index, hash] of hashes.entries()) {
      const block = this.#byHash.get(hash);
      if (block === undefined || block.parentHash !== (hashes[index - 1] ?? rootHash)) break;
      const start = index * this.#blockSize;
      if (!block.tokenIds.every((id, offset) => id === tokens[start + offset])) break;
      blockIds.push(block.blockId);
      if (block.hasMtp && numWithMtp === index) numWithMtp++;
    }
    return { blockIds, numWithMtp };
  }

  /** Takes a reference of each of these blocks, which were found just now. */
  takeFound(blockIds: readonly number[]): void {
    for (const blockId of blockIds) {
      this.#idle.delete(blockId);
      this.#pool.retain(blockId);
    }
  }

  /** A block to write into: a free one, or the least recently used idle one with its content given up. */
  take(): number | undefined {
    if (this.#pool.numFree === 0) {
      const evicted = this.#idle.pop();
      if (evicted === undefined) return undefined;
      this.#forget(evicted);
      this.#pool.free(evicted.blockId);
      this.#onChange({ kind: 'removed', hash: evicted.hash });
    }
    return this.#pool.take();
  }

  /** Gives up one reference of each block; the last of a chain is evicted first. */
  release(blockTable: readonly number[]): void {
    for (let index = blockTable.length - 1; index >= 0; index--) {
      const blockId = blockTable[index]!;
      if (this.#pool.release(blockId) > 0) continue;
      const cached = this.#byBlock.get(blockId);
      if (cached !== undefined && this.#byHash.get(cached.hash) === cached) this.#idle.set(blockId, cached);
      else {
        this.#byBlock.delete(blockId);
        this.#pool.free(blockId);
      }
    }
  }

  /**
   * Block `index` of a chain is full and computed: later sequences may share it. Does nothing where its content is
   * known already, unless it is known without the MTP module's entries and this block has them.
   */
  publish(
    blockId: number,
    index: number,
    hashes: readonly string[],
    rootHash: string,
    tokens: readonly number[],
    hasMtp: boolean,
  ): void {
    const hash = hashes[index]!;
    const known = this.#byHash.get(hash);
    if (this.#byBlock.has(blockId) || (known !== undefined && (known.hasMtp || !hasMtp))) return;
    if (known !== undefined && this.#idle.delete(known.blockId)) {
      this.#forget(known);
      this.#pool.free(known.blockId);
    }
    const parentHash = hashes[index - 1] ?? rootHash;
    const block: CachedBlock = { blockId, hash, parentHash, tokenIds: this.#blockTokens(tokens, index), hasMtp };
    this.#byHash.set(hash, block);
    this.#byBlock.set(blockId, block);
    // Content that another block held until now has been findable all the time.
    if (known !== undefined) return;
    this.#onChange({ kind: 'stored', hash, parentHash: index === 0 ? null : parentHash, tokenIds: block.tokenIds });
  }

  /** Gives up the content of those of these blocks that are found and have no reference. */
  drop(hashes: readonly string[]): void {
    for (const hash of hashes.toReversed()) {
      const block = this.#byHash.get(hash);
      if (block === undefined || !this.#idle.delete(block.blockId)) continue;
      this.#forget(block);
      this.#pool.free(block.blockId);
      this.#onChange({ kind: 'removed', hash });
    }
  }

  isPublished(blockId: number): boolean {
    return this.#byBlock.has(blockId);
  }

  /** Hashes by which a block is found now: for checks. */
  findable(): string[] {
    return [...this.#byHash.keys()];
  }

  /** What is published now, replaced blocks that are still in use included: for checks. */
  published(): readonly Readonly<CachedBlock>[] {
    return [...this.#byBlock.values()];
  }

  /** free + referenced + cached-only == total */
  checkCounts(): void {
    const { numBlocks, numFree, numReferenced } = this.#pool;
    if (numFree + numReferenced + this.numIdle !== numBlocks) {
      throw new Error(
        `block invariant broken: ${numFree} free + ${numReferenced} referenced + ${this.numIdle} cached-only != ${numBlocks}`,
      );
    }
  }

  /**
   * Every published block is full, is referenced or cached-only, never both, and is found by its hash; unless it is
   * referenced and was replaced by one with the MTP module's entries.
   */
  checkInvariant(): void {
    for (const [hash, block] of this.#byHash) {
      if (block.hash !== hash || this.#byBlock.get(block.blockId) !== block) {
        throw new Error('block invariant broken: hashes and blocks disagree');
      }
    }
    for (const [blockId, block] of this.#byBlock) {
      if (block.tokenIds.length !== this.#blockSize) {
        throw new Error(`block invariant broken: published block ${blockId} is not full`);
      }
      const isIdle = this.#idle.has(blockId);
      const found = this.#byHash.get(block.hash);
      const isReplaced = !isIdle && !block.hasMtp && found !== block;
      if ((found !== block && !isReplaced) || this.#pool.isFree(blockId)) {
        throw new Error(`block invariant broken: published block ${blockId} is free or unknown by its hash`);
      }
      if (isIdle !== (this.#pool.references(blockId) === 0)) {
        throw new Error(`block invariant broken: block ${blockId} is idle and referenced, or neither`);
      }
    }
  }

  #forget(block: CachedBlock): void {
    this.#byHash.delete(block.hash);
    this.#byBlock.delete(block.blockId);
  }

  #blockTokens(tokens: readonly number[], index: number): Int32Array {
    return Int32Array.from(tokens.slice(index * this.#blockSize, (index + 1) * this.#blockSize));
  }
}
