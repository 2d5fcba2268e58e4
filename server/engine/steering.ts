import type { ControlMark, EngineRequest, ThinkingControl, TokenPhase } from './request.js';

export type ReasoningEnd = 'budget' | 'answer_reserve' | 'loop' | 'client';

type Thinking = NonNullable<EngineRequest['thinking']>;

/** Longest n-gram whose repetition counts as a loop. */
const MAX_NGRAM = 64;

const NO_IDS: readonly number[] = []; // [0]

/**
 * Ends the reasoning of one sequence, or keeps it going: decides from the tokens so far, and from the marks of what a
 * client has asked, which ids are forced next; so that steps, chunks and preemptions change nothing.
 */
export class Steering {
  readonly #thinking: Thinking;
  /** what a client has asked, in order of `at`; those of an earlier submission may be ahead of the tokens */
  readonly marks: ControlMark[]; // [num_controls]
  #numTokens = 0;
  #numReasoning = 0;
  /** tokens of the present stretch of reasoning */
  #stretch: number[] = []; // [num_tokens]
  /** for each n how many last tokens equal the one n before them */
  readonly #repeated = new Int32Array(MAX_NGRAM + 1); // [MAX_NGRAM + 1] entry 0 is unused
  #ended: ReasoningEnd | null = null;

  constructor(thinking: Thinking, marks: readonly ControlMark[] = []) {
    this.#thinking = thinking;
    this.marks = [...marks];
  }

  /** why reasoning was ended; null where it ended by itself or goes on */
  get ended(): ReasoningEnd | null {
    return this.#ended;
  }

  /** Takes in a sampled or forced token. */
  observe(tokenId: number, phase: TokenPhase): void {
    this.#numTokens++;
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

  /** A client asks for something, behind the tokens so far. */
  control(control: ThinkingControl): void {
    const at = this.#numTokens;
    this.marks.push(
      control.kind === 'end'
        ? { kind: 'end', at }
        : { kind: 'extend', at, untilReasoning: this.#numReasoning + control.numTokens },
    );
  }

  /** Ids that take the place of a sampled end of reasoning where it has been extended; mostly none. */
  extensionIds(numLeft: number, numNeeded: number): readonly number[] {
    const { extendIds = NO_IDS, endIds, minAnswerTokens } = this.#thinking;
    if (this.#numReasoning >= this.#extendedTo) return NO_IDS;
    const kept = Math.max(minAnswerTokens, numNeeded);
    return numLeft - extendIds.length - endIds.length > kept ? extendIds : NO_IDS;
  }

  /**
   * Ids to append now, where a sequence that is still reasoning has so many tokens left; mostly none. `numNeeded` are
   * kept for an answer that is only complete with so many.
   */
  forcedIds(numLeft: number, numNeeded = 0): readonly number[] {
    const reason = this.#reason(numLeft, numNeeded);
    if (reason === null) return NO_IDS;
    const { endIds } = this.#thinking;
    // A client's end leaves the reasoning as it was sent. Who begins to reason again gets no second closing phrase.
    const ids = this.#ended === null && reason !== 'client' ? endIds : endIds.slice(-1);
    this.#ended ??= reason;
    return ids;
  }

  #reason(numLeft: number, numNeeded: number): ReasoningEnd | null {
    const { budget, endIds, minAnswerTokens } = this.#thinking;
    if (this.marks.some(({ kind, at }) => kind === 'end' && at <= this.#numTokens)) return 'client';
    if (this.#numTokens === 0) return null;
    const extendedTo = this.#extendedTo;
    if (this.#numReasoning >= Math.max(budget, extendedTo)) return 'budget';
    const kept = Math.max(minAnswerTokens, numNeeded);
    if (kept > 0 && numLeft - endIds.length <= kept) return 'answer_reserve';
    return this.#numReasoning >= extendedTo && this.#isLoop() ? 'loop' : null;
  }

  /** reasoning tokens that a client has asked for; 0 where it has not */
  get #extendedTo(): number {
    let most = 0;
    for (const mark of this.marks) {
      if (mark.kind === 'extend' && mark.at <= this.#numTokens) most = Math.max(most, mark.untilReasoning);
    }
    return most;
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
