import type { EmittedToken } from '../engine/request.js';
import { Detokenizer } from './detokenizer.js';
import { StopMatcher } from './stop-matcher.js';
import { ToolCallParser, type ToolCallDelta, type ToolMarkers } from './tool-call-parser.js';
import type { Tokenizer } from './tokenizer.js';

export interface TextDelta {
  kind: 'reasoning' | 'content';
  text: string;
}

export type OutputDelta = TextDelta | ToolCallDelta;

/** A token with the engine's label; 'control' tokens carry no text. */
export type LabelledToken = Pick<EmittedToken, 'id' | 'phase'>;

/**
 * Labelled tokens of one sequence -> deltas for the client. Stop strings are looked for in the answer alone.
 * Reasoning that is nothing but whitespace is no reasoning, so leading whitespace waits for something else.
 */
export class OutputParser {
  readonly #tokenizer: Tokenizer;
  readonly #reasoning: Detokenizer;
  readonly #answer: Detokenizer;
  readonly #stops: StopMatcher;
  readonly #tools: ToolCallParser;
  #phase: 'reasoning' | 'answer' | 'tool' | null = null;
  #reasoningSpace: string | null = '';

  constructor(tokenizer: Tokenizer, toolMarkers: ToolMarkers, stops: readonly string[]) {
    this.#tokenizer = tokenizer;
    this.#reasoning = new Detokenizer(tokenizer);
    this.#answer = new Detokenizer(tokenizer);
    this.#stops = new StopMatcher(stops);
    this.#tools = new ToolCallParser(tokenizer, toolMarkers);
  }

  /** the stop string that ended the answer; tokens after it must not be pushed */
  get matchedStop(): string | null {
    return this.#stops.matched;
  }

  get numToolCalls(): number {
    return this.#tools.numCalls;
  }

  push(token: LabelledToken): OutputDelta[] {
    const { id, phase } = token;
    if (phase === 'control') return [];
    const deltas = phase === this.#phase ? [] : this.#leavePhase();
    this.#phase = phase;
    if (phase === 'tool') return [...deltas, ...this.#tools.push(id)];
    if (this.#tokenizer.isSpecial(id)) return deltas;
    if (phase === 'reasoning') this.#addReasoning(deltas, this.#reasoning.push(id));
    else this.#addContent(deltas, this.#stops.push(this.#answer.push(id)));
    return deltas;
  }

  /** the sequence is over: everything held back comes out */
  end(): OutputDelta[] {
    const deltas = this.#leavePhase();
    this.#phase = null;
    return deltas;
  }

  #leavePhase(): OutputDelta[] {
    const deltas: OutputDelta[] = [];
    if (this.#phase === 'reasoning') this.#addReasoning(deltas, this.#reasoning.end());
    if (this.#phase === 'answer') {
      this.#addContent(deltas, this.#stops.push(this.#answer.end()));
      this.#addContent(deltas, this.#stops.end());
    }
    if (this.#phase === 'tool') deltas.push(...this.#tools.end());
    return deltas;
  }

  #addReasoning(deltas: OutputDelta[], text: string): void {
    if (text === '') return;
    if (this.#reasoningSpace !== null) {
      const all = this.#reasoningSpace + text;
      if (all.trim() === '') {
        this.#reasoningSpace = all;
        return;
      }
      this.#reasoningSpace = null;
      text = all;
    }
    deltas.push({ kind: 'reasoning', text });
  }

  #addContent(deltas: OutputDelta[], text: string): void {
    if (text !== '') deltas.push({ kind: 'content', text });
  }
}
