import type { GrammarThread } from '../grammar/thread.js';
import type { RequestGrammar } from './request.js';

/** What the engine asks of the thread that follows grammars. */
export type GrammarFollower = Pick<GrammarThread, 'open' | 'accept' | 'close' | 'end'>;

export interface GrammarCursorListener {
  /** the mask for the next token is there */
  onReady(): void;
  onFailed(error: { code: string; message: string }): void;
}

/** Where one sequence stands in its grammar, and which tokens may come next. */
export class GrammarCursor {
  readonly #follower: GrammarFollower;
  readonly #handle: number;
  /** so many tokens surely complete the whole answer; 0 until the first mask is there */
  numToEnd = 0;
  /** with so many tokens left the mask is the same as with any more */
  #mostToEnd = 0;
  #hasBegun = false;
  /** which tokens may come next; meaningful where isReady and not isComplete */
  mask: Int32Array | null = null; // [ceil(vocab_size / 32)]
  isReady = false;
  /** nothing can follow: the sequence ends here */
  isComplete = false;

  /** `numLeft`: most tokens of the answer; Infinity while that is not known. */
  constructor(
    follower: GrammarFollower,
    grammar: RequestGrammar,
    stopIds: number[],
    numLeft: number,
    listener: GrammarCursorListener,
  ) {
    this.#follower = follower;
    this.#handle = follower.open(grammar.key, { rules: grammar.rules }, stopIds, numLeft, {
      onMask: ({ words, numToEnd, mostToEnd }) => {
        if (!this.#hasBegun) this.numToEnd = numToEnd;
        this.#mostToEnd = mostToEnd;
        this.mask = words;
        this.isReady = true;
        this.isComplete = words === null;
        listener.onReady();
      },
      onFailed: (message, isFirst) =>
        listener.onFailed(
          isFirst
            ? { code: 'invalid_value', message: `The output cannot be held to this format: ${message}; simplify it.` }
            : { code: 'engine_failed', message: `The output could not be held to its format: ${message}.` },
        ),
    });
  }

  /** The answer begins, and has so many tokens; the mask comes later where that makes it another one. */
  begin(numLeft: number): void {
    this.#hasBegun = true;
    if (this.isReady && numLeft >= this.#mostToEnd) return;
    this.isReady = false;
    this.#follower.accept(this.#handle, [], numLeft);
  }

  /** Goes on by sampled tokens, and `numLeft` more may follow; the mask behind them comes later. */
  accept(tokens: number[], numLeft: number): void {
    this.#hasBegun = true;
    this.isReady = false;
    this.#follower.accept(this.#handle, tokens, numLeft);
  }

  close(): void {
    this.#follower.close(this.#handle);
  }
}
