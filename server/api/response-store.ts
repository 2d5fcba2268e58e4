import { LRUCache } from 'lru-cache';
import { ApiError } from '../errors.js';
import type { RequestOrigin } from './completion.js';
import type { components } from './openapi.js';
import type { Item } from './response-items.js';

/** A response that can be found again. Its conversation is its own items behind those of the response before it. */
export interface StoredResponse {
  id: string;
  tenant: string;
  previousId: string | null;
  status: components['schemas']['ResponseStatus'];
  /** items of the request, as JSON */
  input: string;
  /** the response, as JSON */
  body: string;
}

/** Where a response may be found that another one goes on with. */
export interface ResponseSource {
  get(id: string, tenant: string): StoredResponse | undefined;
}

/** Responses by id, of each API key its own; the ones used longest ago make room for others. */
export interface ResponseStore extends ResponseSource {
  /** Also in place of an earlier state of the same response. */
  put(response: StoredResponse): void;
  delete(id: string): void;
  close(): void;
}

/** Keeps what a client has been told already: where that fails, its response is none the worse. */
export function keepResponse(store: ResponseStore, response: StoredResponse, { log }: RequestOrigin): void {
  try {
    store.put(response);
  } catch (error) {
    log.error(error, `the response ${response.id} could not be stored`);
  }
}

/** Responses in memory: at most so many bytes of them. */
export class MemoryResponses implements ResponseStore {
  readonly #stored: LRUCache<string, StoredResponse>;

  constructor(maxBytes: number) {
    this.#stored = new LRUCache({ maxSize: maxBytes, sizeCalculation: sizeOf });
  }

  put(response: StoredResponse): void {
    this.#stored.set(response.id, response);
  }

  get(id: string, tenant: string): StoredResponse | undefined {
    const response = this.#stored.get(id);
    return response?.tenant === tenant ? response : undefined;
  }

  delete(id: string): void {
    this.#stored.delete(id);
  }

  close(): void {
    this.#stored.clear();
  }
}

/** About the bytes that a response takes: texts of more than Latin letters have two a character. */
export function sizeOf({ input, body }: StoredResponse): number {
  return 512 + 2 * (input.length + body.length);
}

/** Everything that a conversation holds up to the end of a response. Uses all its responses: they are forgotten together. */
export function itemsBefore(previousId: string, tenant: string, source: ResponseSource): Item[] {
  const turns: Item[][] = [];
  for (let id: string | null = previousId; id !== null;) {
    const stored = source.get(id, tenant);
    if (stored === undefined) {
      const shown = id.slice(0, 100);
      const why = id === previousId ? `There is no response '${shown}'` : `'${shown}', which it goes on with, is gone`;
      const message = `${why}: it was not stored, was deleted or had to make room. Send the whole conversation as input.`;
      throw new ApiError('previous_response_not_found', message, 'previous_response_id');
    }
    if (stored.status === 'queued' || stored.status === 'in_progress') {
      const message = `The response '${id}' is still being made; go on with it when it has ended.`;
      throw new ApiError('invalid_value', message, 'previous_response_id');
    }
    turns.push([...(JSON.parse(stored.input) as Item[]), ...(JSON.parse(stored.body) as { output: Item[] }).output]);
    id = stored.previousId;
  }
  return turns.reverse().flat();
}
