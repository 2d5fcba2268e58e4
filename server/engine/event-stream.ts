import type { EngineEvent } from './request.js';

/**
 * The events of one sequence on their way to one consumer. Unbounded: a sequence has few events, and one that is not
 * read must not stall the others. Leaving the iteration early calls onLeave.
 */
export class EventStream implements AsyncIterableIterator<EngineEvent> {
  readonly #queue: EngineEvent[] = []; // [num_unread]
  readonly #onLeave: () => void;
  #waiter: ((result: IteratorResult<EngineEvent>) => void) | null = null;
  #isEnded = false;

  constructor(onLeave: () => void) {
    this.#onLeave = onLeave;
  }

  /** Adds an event; the one with a finishReason is the last. */
  push(event: EngineEvent): void {
    if (this.#isEnded) return;
    this.#isEnded = event.finishReason !== undefined;
    if (this.#waiter === null) {
      this.#queue.push(event);
      return;
    }
    const waiter = this.#waiter;
    this.#waiter = null;
    waiter({ value: event, done: false });
  }

  next(): Promise<IteratorResult<EngineEvent>> {
    const event = this.#queue.shift();
    if (event !== undefined) return Promise.resolve({ value: event, done: false });
    if (this.#isEnded) return Promise.resolve({ value: undefined, done: true });
    return new Promise((resolve) => {
      this.#waiter = resolve;
    });
  }

  return(): Promise<IteratorResult<EngineEvent>> {
    if (!this.#isEnded) {
      this.#isEnded = true;
      this.#onLeave();
    }
    this.#queue.length = 0;
    this.#waiter?.({ value: undefined, done: true });
    this.#waiter = null;
    return Promise.resolve({ value: undefined, done: true });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}
