import type { EngineRequest, TokenPhase } from './request.js';

export type ReasoningEnd = 'budget' | 'answer_reserve' | 'loop';

type Thinking = NonNullable<EngineRequest['thinking']>;

/** Longest n-gram whose repetition counts as a loop. */
const MAX_NGRAM = 64;

const NO_IDS: readonly number[] = []; // [0]

/**
 * Ends the reasoning of one sequence: decides from the tokens so far alone which ids are forced next, so that steps,
 * chunks and preemptions change nothing.
 */
export class Steering {
  readonly #thinking: Thinking;
  #numReasoning = 0;
  /** tokens of the present stretch of reasoning */
  #stretch: number[] = []; // [num_tokens]
  /** for each n how many last tokens equal the one n before them */
  readonly #repeated = new Int32Array(MAX_NGRAM + 1); // [MAX_NGRAM + 1] entry 0 is unused
  #ended: ReasoningEnd | null = null;

  constructor(thinking: Thinking) {
    this.#thinking = thinking;
  }

  /** why reasoning was ended; null where it ended by itself or goes on */
  get ended(): ReasoningEnd | null {
    return this.#ended;
  }

  /** Takes in a sampled or forced token. */
  observe(tokenId: number, phase: TokenPhase): void {
    if (phase !== 'reasoning') {
      this.#stretch = [];
      this.#repeated.fill(0);
      return;
    }
    this.#numReasoning++;
    if (this.#thinking.loopTokens === 0) return;
    const stretch = this.#stretch;
    for (let n = 1; n <= MAX_NGRAM; n++) {
      const isSame = n <= stretch.length && stretch[stretch.length - n] === tokenId;
      this.#repeated[n] = isSame ? this.#repeated[n]! + 1 : 0;
    }
    stretch.push(tokenId);
    if (stretch.length > 2 * MAX_NGRAM) this.#stretch = stretch.slice(-MAX_NGRAM);
  }

  /**
   * Ids to append now, where a sequence that is still reasoning has so many tokens left; mostly none. `numNeeded` are
   * kept for an answer that is only complete with so many.
   */
  forcedIds(numLeft: number, numNeeded = 0): readonly number[] {
    const reason = this.#reason(numLeft, numNeeded);
    if (reason === null) return NO_IDS;
    const { endIds } = this.#thinking;
    // Who begins to reason again after that gets no second closing phrase.
    const ids = this.#ended === null ? endIds : endIds.slice(-1);
    this.#ended ??= reason;
    return ids;
  }

  #reason(numLeft: number, numNeeded: number): ReasoningEnd | null {
    const { budget, endIds, minAnswerTokens } = this.#thinking;
    if (this.#numReasoning >= budget) return 'budget';
    const kept = Math.max(minAnswerTokens, numNeeded);
    if (kept > 0 && numLeft - endIds.length <= kept) return 'answer_reserve';
    return this.#isLoop() ? 'loop' : null;
  }

  /** An n-gram counts once it is there twice. */
  #isLoop(): boolean {
    const { loopTokens } = this.#thinking;
    if (loopTokens === 0) return false;
    for (let n = 1; n <= MAX_NGRAM; n++) {
      const repeated = this.#repeated[n]!;
      if (repeated >= n && repeated + n >= loopTokens) return true;
    }
    return false;
  }
}
