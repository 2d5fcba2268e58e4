/**
 * Which block is free and how often each block is referenced. A block is free, referenced, or neither: then the
 * prefix cache keeps it for its content alone.
 */
export class BlockPool {
  readonly numBlocks: number;
  readonly #free: number[]; // [num_free] a stack of block ids
  readonly #isFree: Uint8Array; // [num_blocks]
  readonly #references: Int32Array; // [num_blocks]
  #numReferenced = 0;

  constructor(numBlocks: number) {
    this.numBlocks = numBlocks;
    this.#free = Array.from({ length: numBlocks }, (_, index) => numBlocks - 1 - index);
    this.#isFree = new Uint8Array(numBlocks).fill(1);
    this.#references = new Int32Array(numBlocks);
  }

  get numFree(): number {
    return this.#free.length;
  }

  get numReferenced(): number {
    return this.#numReferenced;
  }

  references(blockId: number): number {
    return this.#references[blockId]!;
  }

  isFree(blockId: number): boolean {
    return this.#isFree[blockId] === 1;
  }

  /** A free block with one reference; undefined where none is free. */
  take(): number | undefined {
    const blockId = this.#free.pop();
    if (blockId === undefined) return undefined;
    this.#isFree[blockId] = 0;
    this.retain(blockId);
    return blockId;
  }

  retain(blockId: number): void {
    if (this.isFree(blockId)) throw new Error(`block ${blockId} is free and cannot be referenced`);
    if (this.#references[blockId]!++ === 0) this.#numReferenced++;
  }

  /** Returns the references that are left. At 0 the caller frees the block or keeps it for its content. */
  release(blockId: number): number {
    const left = this.#references[blockId]! - 1;
    if (left < 0) throw new Error(`block ${blockId} has no reference to release`);
    this.#references[blockId] = left;
    if (left === 0) this.#numReferenced--;
    return left;
  }

  /** Puts a block without references back among the free ones. */
  free(blockId: number): void {
    if (this.isFree(blockId) || this.references(blockId) !== 0) {
      throw new Error(`block ${blockId} is free already or still referenced`);
    }
    this.#isFree[blockId] = 1;
    this.#free.push(blockId);
  }
}
