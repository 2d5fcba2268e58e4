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
  /** which tokens may come next; meaningful where isReady and not isComplete */
  mask: Int32Array | null = null; // [ceil(vocab_size / 32)]
  isReady = false;
  /** nothing can follow: the sequence ends here */
  isComplete = false;

  constructor(follower: GrammarFollower, grammar: RequestGrammar, stopIds: number[], listener: GrammarCursorListener) {
    this.#follower = follower;
    this.#handle = follower.open(grammar.key, { rules: grammar.rules }, stopIds, {
      onMask: (words) => {
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

  /** Goes on by sampled tokens; the mask behind them comes later. */
  accept(tokens: number[]): void {
    this.isReady = false;
    this.#follower.accept(this.#handle, tokens);
  }

  close(): void {
    this.#follower.close(this.#handle);
  }
}
