/** What changes in a prefix cache, told to whoever routes requests to where their prefix lies. Plain values. */

/** A block became findable; parentHash is null for the first of a chain. */
export interface BlockStored {
  kind: 'stored';
  hash: string;
  parentHash: string | null;
  tokenIds: Int32Array; // [block_size]
}

/** A block is no longer found. */
export interface BlockRemoved {
  kind: 'removed';
  hash: string;
}

/** Nothing is found any more: a cache has begun, empty. */
export interface AllBlocksCleared {
  kind: 'cleared';
}

export type CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared;
