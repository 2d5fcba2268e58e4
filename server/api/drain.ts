/** Counts completions whose response is not all sent, and waits for them: what a graceful shutdown does. */
export class Drain {
  readonly #running = new Set<() => void>();
  #isDraining = false;
  #onIdle: (() => void) | null = null;

  get isDraining(): boolean {
    return this.#isDraining;
  }

  get numRunning(): number {
    return this.#running.size;
  }

  /** A completion begins; `abort` ends it early. Returns what to call when its response is over. */
  enter(abort: () => void): () => void {
    this.#running.add(abort);
    return () => {
      this.#running.delete(abort);
      if (this.#running.size === 0) this.#onIdle?.();
    };
  }

  /** From now on nothing is taken. Resolves when the last completion has ended, or after `timeoutMs` aborts the rest. */
  async begin(timeoutMs: number): Promise<void> {
    this.#isDraining = true;
    if (this.#running.size === 0) return;
    await this.#idleWithin(timeoutMs);
    if (this.#running.size === 0) return;
    for (const abort of [...this.#running]) abort();
    await this.#idleWithin(2000);
  }

  #idleWithin(timeoutMs: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, timeoutMs);
      this.#onIdle = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
