import type { PrefixCache } from './prefix-cache.js';
import { GREEDY, NO_MARKERS, type EngineRequest, type PrewarmRequest } from './request.js';

/** Prompts that wait; more make the oldest ones go. */
const MAX_WAITING = 64;

/**
 * Prompts to be computed in idle time, a part at a time: each part is a request of its own that ends with its first
 * step, after which the next one finds it in the prefix cache. So a request that comes waits for one step at most, and
 * loses none of what was computed.
 */
export class Prewarmer {
  readonly #cache: PrefixCache;
  readonly #blockSize: number;
  /** blocks of one part */
  readonly #numBlocks: number;
  readonly #waiting: PrewarmRequest[] = []; // [num_waiting]
  #numParts = 0;

  constructor(cache: PrefixCache, blockSize: number, maxStepTokens: number) {
    this.#cache = cache;
    this.#blockSize = blockSize;
    this.#numBlocks = Math.max(1, Math.floor(maxStepTokens / 2 / blockSize));
  }

  add(prewarm: PrewarmRequest): void {
    const { promptIds, supersededIds, cacheSalt } = prewarm;
    let numSame = 0;
    while (numSame < promptIds.length && promptIds[numSame] === supersededIds[numSame]) numSame++;
    const hashes = this.#hashesOf(supersededIds, cacheSalt);
    this.#cache.drop(hashes.slice(Math.floor(numSame / this.#blockSize)));
    this.#waiting.push(prewarm);
    if (this.#waiting.length > MAX_WAITING) this.#waiting.shift();
  }

  /** The next part that is not cached; null where all is. A part that finds no room is given up with its prompt. */
  next(): EngineRequest | null {
    for (let prewarm = this.#waiting[0]; prewarm !== undefined; prewarm = this.#waiting[0]) {
      const { promptIds, cacheSalt } = prewarm;
      const hashes = this.#hashesOf(promptIds, cacheSalt);
      const { blockIds } = this.#cache.findPrefix(hashes, this.#cache.rootHash(cacheSalt), promptIds);
      const numCached = blockIds.length;
      const numBlocks = Math.min(hashes.length, numCached + this.#numBlocks);
      if (numCached < hashes.length && numBlocks < this.#cache.numAvailable) {
        if (numBlocks === hashes.length) this.#waiting.shift();
        return this.#partOf(prewarm, numBlocks);
      }
      this.#waiting.shift();
    }
    return null;
  }

  #partOf({ promptIds, cacheSalt }: PrewarmRequest, numBlocks: number): EngineRequest {
    return {
      requestId: `prewarm-${this.#numParts++}`,
      promptIds: promptIds.slice(0, numBlocks * this.#blockSize),
      sampling: GREEDY,
      markers: NO_MARKERS,
      startPhase: 'answer',
      cacheSalt,
      prefillOnly: true,
    };
  }

  #hashesOf(ids: readonly number[], cacheSalt: string): string[] {
    const hashes: string[] = [];
    this.#cache.extendHashes(hashes, this.#cache.rootHash(cacheSalt), ids);
    return hashes;
  }
}
