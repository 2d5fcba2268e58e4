import type { PhaseMarkers, TokenPhase } from './request.js';

/**
 * Labels the tokens of one sequence from their ids alone. Markers and stop tokens are 'control'. Inside tool calls
 * only the closing marker or a stop token ends the phase: a think marker there is part of an argument. Calls made
 * inside reasoning are tool tokens too; after them reasoning goes on.
 */
export class PhaseTracker {
  readonly #markers: PhaseMarkers;
  #phase: Exclude<TokenPhase, 'control'>;
  #phaseBeforeTools: 'reasoning' | 'answer' = 'answer';

  constructor(markers: PhaseMarkers, startPhase: 'reasoning' | 'answer') {
    this.#markers = markers;
    this.#phase = startPhase;
  }

  /** of the next token, unless it is a marker */
  get phase(): Exclude<TokenPhase, 'control'> {
    return this.#phase;
  }

  /** whether reasoning goes on, in calls of tools too that are made inside it */
  get isReasoning(): boolean {
    return (this.#phase === 'tool' ? this.#phaseBeforeTools : this.#phase) === 'reasoning';
  }

  label(tokenId: number, isStop: boolean): TokenPhase {
    if (isStop) return 'control';
    const { thinkStart, thinkEnd, toolCallsBegin, toolCallsEnd } = this.#markers;
    if (this.#phase === 'tool') {
      if (tokenId !== toolCallsEnd) return 'tool';
      this.#phase = this.#phaseBeforeTools;
      return 'control';
    }
    if (tokenId === thinkStart) this.#phase = 'reasoning';
    else if (tokenId === thinkEnd) this.#phase = 'answer';
    else if (tokenId === toolCallsBegin) {
      this.#phaseBeforeTools = this.#phase;
      this.#phase = 'tool';
    } else if (tokenId !== toolCallsEnd) return this.#phase;
    return 'control';
  }
}
