/**
 * Finds stop strings in a text that comes in pieces. What might be the beginning of one is held back. The match
 * that is complete first ends the text (of two complete at once, the longer), so pieces do not matter.
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  readonly #longest: number;
  #heldBack = '';
  #matched: string | null = null;

  constructor(stops: readonly string[]) {
    this.#stops = stops;
    this.#longest = stops.reduce((longest, stop) => Math.max(longest, stop.length), 0);
  }

  /** the stop string that ended the text; null while none has */
  get matched(): string | null {
    return this.#matched;
  }

  /** text that is now safe to emit; nothing after a match */
  push(piece: string): string {
    if (this.#matched !== null || piece === '') return '';
    if (this.#longest === 0) return piece;
    const text = this.#heldBack + piece;
    let bestStart = -1;
    let bestEnd = Infinity;
    for (const stop of this.#stops) {
      const start = text.indexOf(stop);
      if (start < 0) continue;
      const end = start + stop.length;
      if (end < bestEnd || (end === bestEnd && start < bestStart)) {
        bestStart = start;
        bestEnd = end;
        this.#matched = stop;
      }
    }
    if (this.#matched !== null) {
      this.#heldBack = '';
      return text.slice(0, bestStart);
    }
    const heldBack = this.#heldBackLength(text);
    this.#heldBack = text.slice(text.length - heldBack);
    return text.slice(0, text.length - heldBack);
  }

  /** the rest, when no more text comes */
  end(): string {
    const rest = this.#heldBack;
    this.#heldBack = '';
    return rest;
  }

  #heldBackLength(text: string): number {
    for (let length = Math.min(this.#longest - 1, text.length); length > 0; length--) {
      const tail = text.slice(-length);
      if (this.#stops.some((stop) => stop.length > length && stop.startsWith(tail))) return length;
    }
    return 0;
  }
}
