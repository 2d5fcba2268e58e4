import type { StreamEvent } from './feed.js';

/** Events of a stream, numbered from 0 on; the latest are kept, so that a client that was cut off gets them. */
export class EventLog {
  readonly #maxBytes: number;
  readonly #events: StreamEvent[] = []; // [num_kept] the last one is number `length` - 1
  #numDropped = 0;
  #numBytes = 0;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  /** events so far */
  get length(): number {
    return this.#numDropped + this.#events.length;
  }

  /** about what is kept in memory */
  get numBytes(): number {
    return this.#numBytes;
  }

  add(event: StreamEvent): void {
    this.#events.push(event);
    this.#numBytes += event.data.length;
    if (this.#numBytes <= this.#maxBytes) return;
    // Down to three quarters at once: taking one off the front of a long array moves all the others.
    let numOver = 0;
    while (this.#numBytes > 0.75 * this.#maxBytes && numOver < this.#events.length - 1) {
      this.#numBytes -= this.#events[numOver++]!.data.length;
    }
    this.#events.splice(0, numOver);
    this.#numDropped += numOver;
  }

  /** Whether event number `last` was made, and all behind it are kept. */
  has(last: number): boolean {
    return last < this.length && last + 1 >= this.#numDropped;
  }

  /** Numbers and events behind number `last`; has(last) is true. */
  after(last: number): [number, StreamEvent][] {
    return this.#events.slice(last + 1 - this.#numDropped).map((event, index) => [last + 1 + index, event]);
  }
}
