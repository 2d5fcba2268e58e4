import { LRUCache } from 'lru-cache';
import type { ControlMark } from '../engine/request.js';
import type { ChatJob } from './chat-request.js';

/** of all prompts and completions that are kept */
const MAX_TOTAL_TOKENS = 4 * 2 ** 20;

/** What a completion was asked for, and what it came to. */
export interface FinishedCompletion {
  job: ChatJob;
  tenant: string;
  tokenIds: readonly number[]; // [num_tokens]
  /** what a client has asked of the reasoning meanwhile */
  controls: readonly ControlMark[]; // [num_controls]
}

/** The latest completions that ended by themselves, by response and choice. */
export class FinishedCompletions {
  readonly #byId = new LRUCache<string, FinishedCompletion>({
    maxSize: MAX_TOTAL_TOKENS,
    sizeCalculation: ({ job, tokenIds }) => job.engineRequest.promptIds.length + tokenIds.length + 256,
  });

  add(responseId: string, index: number, finished: FinishedCompletion): void {
    this.#byId.set(`${responseId}:${index}`, finished);
  }

  /** Choice `index` of a response. */
  find(responseId: string, index: number, tenant: string): FinishedCompletion | undefined {
    const finished = this.#byId.get(`${responseId}:${index}`);
    return finished?.tenant === tenant ? finished : undefined;
  }
}
