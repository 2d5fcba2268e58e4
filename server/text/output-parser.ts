import type { EmittedToken } from '../engine/request.js';
import { Detokenizer } from './detokenizer.js';
import { StopMatcher } from './stop-matcher.js';
import { makeToolPhaseParser, type ToolCallDelta, type ToolMarkers, type ToolPhaseParser } from './tool-call-parser.js';
import type { Tokenizer } from './tokenizer.js';

export interface TextDelta {
  kind: 'reasoning' | 'content';
  text: string;
}

export type OutputDelta = TextDelta | ToolCallDelta;

/** A token with the engine's label; 'control' tokens carry no text. */
export type LabelledToken = Pick<EmittedToken, 'id' | 'phase'>;

export type StopScope = 'answer' | 'all';

/** Tokens of one sequence -> deltas for the client. How tokens are spread over calls changes nothing. */
export interface TokenParser {
  /** the stop string that ended the text; tokens after it must not be pushed */
  readonly matchedStop: string | null;
  readonly numToolCalls: number;
  /** calls whose end has come */
  readonly numEndedCalls: number;
  push(token: LabelledToken): OutputDelta[];
  /** the sequence is over: everything held back comes out */
  end(): OutputDelta[];
  /** what the token pushed last was part of */
  readonly phase: LabelledToken['phase'];
}

/** V3.2 opens calls with `<` before the mark that is known by id; the line breaks before it belong to it. */
const DSML_LEAD = /\s*<?$/;

/**
 * Labelled tokens -> deltas. Stop strings are looked for in the answer alone, unless `stopScope` is all. Reasoning
 * that is nothing but whitespace is no reasoning, so leading whitespace waits for something else.
 */
export class OutputParser implements TokenParser {
  readonly #tokenizer: Tokenizer;
  readonly #reasoning: Detokenizer;
  readonly #answer: Detokenizer;
  readonly #stops: StopMatcher;
  readonly #reasoningStops: StopMatcher;
  readonly #tools: ToolPhaseParser;
  readonly #isDsml: boolean;
  #phase: 'reasoning' | 'answer' | 'tool' | null = null;
  #lastPhase: LabelledToken['phase'] = 'control';
  #reasoningSpace: string | null = '';
  #dsmlLead = '';

  constructor(
    tokenizer: Tokenizer,
    toolMarkers: ToolMarkers,
    stops: readonly string[],
    stopScope: StopScope = 'answer',
  ) {
    this.#tokenizer = tokenizer;
    this.#reasoning = new Detokenizer(tokenizer);
    this.#answer = new Detokenizer(tokenizer);
    this.#stops = new StopMatcher(stops);
    this.#reasoningStops = new StopMatcher(stopScope === 'all' ? stops : []);
    this.#tools = makeToolPhaseParser(tokenizer, toolMarkers);
    this.#isDsml = toolMarkers.dsml !== undefined;
  }

  get matchedStop(): string | null {
    return this.#stops.matched ?? this.#reasoningStops.matched;
  }

  get numToolCalls(): number {
    return this.#tools.numCalls;
  }

  get numEndedCalls(): number {
    return this.#tools.numEnded;
  }

  get phase(): LabelledToken['phase'] {
    return this.#lastPhase;
  }

  push(token: LabelledToken): OutputDelta[] {
    const { id, phase } = token;
    this.#lastPhase = phase;
    if (phase === 'control') return [];
    const deltas = phase === this.#phase ? [] : this.#leavePhase(phase);
    this.#phase = phase;
    if (phase === 'tool') return [...deltas, ...this.#tools.push(id)];
    if (this.#tokenizer.isSpecial(id)) return deltas;
    const text = (phase === 'reasoning' ? this.#reasoning : this.#answer).push(id);
    this.#addText(deltas, phase, this.#isDsml ? this.#holdLead(text) : text);
    return deltas;
  }

  end(): OutputDelta[] {
    const deltas = this.#leavePhase(null);
    this.#phase = null;
    return deltas;
  }

  #leavePhase(next: 'reasoning' | 'answer' | 'tool' | null): OutputDelta[] {
    const deltas: OutputDelta[] = [];
    const phase = this.#phase;
    if (phase === 'tool') deltas.push(...this.#tools.end());
    if (phase !== 'reasoning' && phase !== 'answer') return deltas;
    const rest = (phase === 'reasoning' ? this.#reasoning : this.#answer).end();
    const isCall = next === 'tool' && rest === '' && this.#dsmlLead.endsWith('<');
    this.#addText(deltas, phase, isCall ? '' : this.#dsmlLead + rest);
    this.#dsmlLead = '';
    const matcher = phase === 'reasoning' ? this.#reasoningStops : this.#stops;
    this.#emit(deltas, phase, matcher.end());
    return deltas;
  }

  #holdLead(text: string): string {
    const all = this.#dsmlLead + text;
    const at = DSML_LEAD.exec(all)!.index;
    this.#dsmlLead = all.slice(at);
    return all.slice(0, at);
  }

  #addText(deltas: OutputDelta[], phase: 'reasoning' | 'answer', text: string): void {
    const matcher = phase === 'reasoning' ? this.#reasoningStops : this.#stops;
    this.#emit(deltas, phase, matcher.push(text));
  }

  #emit(deltas: OutputDelta[], phase: 'reasoning' | 'answer', text: string): void {
    if (text === '') return;
    if (phase === 'answer') {
      deltas.push({ kind: 'content', text });
      return;
    }
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
}
