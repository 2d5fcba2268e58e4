import { LRUCache } from 'lru-cache';
import type { Choices } from './choices.js';
import type { Item } from './response-items.js';
import type { ResponseRecord } from './response-record.js';

/** A response that can be found again. */
export interface StoredResponse {
  record: ResponseRecord;
  tenant: string;
  /** items of the request */
  input: readonly Item[];
  /** all that the response answers, from the first turn on */
  conversation: readonly Item[];
  /** while it is made in the background */
  running: Choices | null;
}

export interface StoreLimits {
  maxResponses: number;
  maxBytes: number;
}

const LIMITS: StoreLimits = { maxResponses: 4096, maxBytes: 256 * 2 ** 20 };

/** Responses by id, of each API key its own; the ones used longest ago make room for others. */
export class ResponseStore {
  readonly #stored: LRUCache<string, StoredResponse>;

  constructor({ maxResponses, maxBytes }: StoreLimits = LIMITS) {
    this.#stored = new LRUCache({
      max: maxResponses,
      maxSize: maxBytes,
      sizeCalculation: sizeOf,
      dispose: ({ running }, _id, reason) => {
        if (reason !== 'set') running?.abort();
      },
    });
  }

  /** Also takes over what an entry has grown by. */
  put(entry: StoredResponse): void {
    this.#stored.set(entry.record.id, entry);
  }

  get(id: string, tenant: string): StoredResponse | undefined {
    const entry = this.#stored.get(id);
    return entry?.tenant === tenant ? entry : undefined;
  }

  delete(id: string): void {
    this.#stored.delete(id);
  }
}

/** About the bytes that a response keeps alive: what it shares with others counts for each of them. */
function sizeOf({ conversation, record }: StoredResponse): number {
  let size = 1024;
  for (const item of [...conversation, ...record.output]) {
    size += 256;
    if (item.type === 'function_call') size += 2 * item.arguments.length;
    else if (item.type === 'function_call_output') size += 2 * item.output.length;
    else for (const { text } of item.content) size += 2 * text.length;
  }
  return size;
}
