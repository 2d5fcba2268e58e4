import { Readable } from 'node:stream';
import type { EventSink, StreamEvent } from './feed.js';

export interface SseOptions {
  heartbeatMs: number;
  /** a reader that takes nothing for so long, while something waits for it, is cut off */
  stallMs: number;
}

/** Buffered bytes beyond what the kernel holds, before events are held back and merged. */
const MAX_BUFFERED_BYTES = 64 * 1024;

/**
 * Server-sent events to one client. Whoever writes asks `isReady` first and merges what it has while that is false;
 * `onReady` is called when the client has caught up. A heartbeat goes out when nothing else does.
 */
export class SseWriter implements EventSink {
  readonly stream: Readable;
  onReady: () => void = () => {};
  #isReady = true;
  #lastProgress = performance.now();
  #lastWrite = performance.now();
  readonly #timer: NodeJS.Timeout;
  readonly #heartbeat: () => string;

  /** `heartbeat` is what goes out when nothing else does. */
  constructor({ heartbeatMs, stallMs }: SseOptions, heartbeat: () => string) {
    this.#heartbeat = heartbeat;
    this.stream = new Readable({ highWaterMark: MAX_BUFFERED_BYTES, read: () => this.#wanted() });
    this.#timer = setInterval(
      () => {
        const now = performance.now();
        if (!this.#isReady && now - this.#lastProgress >= stallMs) {
          this.stream.destroy(new Error(`the client has read nothing for ${stallMs} ms`));
        } else if (this.#isReady && now - this.#lastWrite >= heartbeatMs) {
          this.beat();
        }
      },
      Math.min(1000, heartbeatMs, stallMs),
    );
    this.#timer.unref();
    this.stream.once('close', () => clearInterval(this.#timer));
  }

  get isReady(): boolean {
    return this.#isReady;
  }

  get isClosed(): boolean {
    return this.stream.destroyed;
  }

  write({ name, data }: StreamEvent, id?: string): void {
    const lines = [...(id === undefined ? [] : [`id: ${id}`]), ...(name === undefined ? [] : [`event: ${name}`])];
    this.#push([...lines, `data: ${data}\n\n`].join('\n'));
  }

  beat(): void {
    this.#push(this.#heartbeat());
  }

  end(): void {
    if (!this.isClosed) this.stream.push(null);
  }

  #push(text: string): void {
    if (this.isClosed) return;
    this.#lastWrite = performance.now();
    const isReady = this.stream.push(text);
    if (this.#isReady && !isReady) this.#lastProgress = this.#lastWrite;
    this.#isReady = isReady;
  }

  #wanted(): void {
    this.#lastProgress = performance.now();
    if (this.#isReady) return;
    this.#isReady = true;
    this.onReady();
  }
}
