import { Detokenizer } from './detokenizer.js';
import { DsmlParser } from './dsml-parser.js';
import type { Tokenizer } from './tokenizer.js';

/** Token ids inside a tool phase; -1 where the vocabulary has no such token. */
export interface ToolMarkers {
  callBegin: number;
  callEnd: number;
  separator: number;
  /** the marker around each word of V3.2's tags; the others are -1 then */
  dsml?: number;
}

export interface ToolCallDelta {
  kind: 'tool_call';
  /** position among the calls of this answer, from 0 */
  index: number;
  /** set once, in a call's first delta */
  name?: string;
  /** where the model itself names its calls, with the name */
  id?: string;
  arguments: string;
}

/** Text of a tool phase that is no well-formed call: the client gets it as content. */
export interface RawToolText {
  kind: 'content';
  text: string;
}

/** Tokens of a tool phase -> calls, of one model's form. */
export interface ToolPhaseParser {
  readonly numCalls: number;
  /** calls whose end has come */
  readonly numEnded: number;
  push(id: number): (ToolCallDelta | RawToolText)[];
  /** the tool phase is over: what is unfinished is handed out */
  end(): (ToolCallDelta | RawToolText)[];
}

export function makeToolPhaseParser(tokenizer: Tokenizer, markers: ToolMarkers): ToolPhaseParser {
  return markers.dsml === undefined ? new ToolCallParser(tokenizer, markers) : new DsmlParser(tokenizer, markers.dsml);
}

/** V3 and R1 write `function<sep>NAME\n```json\n{...}\n```; V3.1 writes `NAME<sep>{...}`. */
const FENCE_BEGIN = /^([^\n]+)\n```json\n/;
/** might be the fence's end, or the beginning of it */
const FENCE_TAIL = /\s*`{0,3}\s*$/;
const FENCE_END = /\n?```\s*$/;

/** Kimi-K2 names its calls functions.NAME:INDEX, and wants that name back with the result. */
const KIMI_ID = /^functions\.(.+):\d+$/s;

/**
 * Calls between marks, as V3, R1, V3.1 and Kimi-K2 write them. Marks are known by id, so text can hold anything.
 * Arguments are handed out as they come, except for what may be the end of a fence.
 */
export class ToolCallParser implements ToolPhaseParser {
  readonly #tokenizer: Tokenizer;
  readonly #markers: ToolMarkers;
  #state: 'outside' | 'name' | 'arguments' | 'fence' | 'fenced' = 'outside';
  #text: Detokenizer;
  #name = '';
  /** what came after `function<sep>` up to the fence, then what may be the fence's end */
  #heldBack = '';
  #numCalls = 0;
  #numEnded = 0;

  constructor(tokenizer: Tokenizer, markers: ToolMarkers) {
    this.#tokenizer = tokenizer;
    this.#markers = markers;
    this.#text = new Detokenizer(tokenizer);
  }

  get numCalls(): number {
    return this.#numCalls;
  }

  get numEnded(): number {
    return this.#numEnded;
  }

  push(id: number): (ToolCallDelta | RawToolText)[] {
    const { callBegin, callEnd, separator } = this.#markers;
    if (id === callBegin) {
      const rest = this.#finishCall(false);
      this.#state = 'name';
      return rest;
    }
    if (id === separator && this.#state === 'name') return this.#beginArguments();
    if (id === callEnd) return this.#finishCall(true);
    if (this.#tokenizer.isSpecial(id)) return [];
    return this.#onText(this.#text.push(id));
  }

  end(): (ToolCallDelta | RawToolText)[] {
    return this.#finishCall(false);
  }

  #beginArguments(): ToolCallDelta[] {
    this.#name += this.#text.end();
    const written = this.#name.trim();
    if (written === 'function') {
      this.#state = 'fence';
      return [];
    }
    this.#state = 'arguments';
    const name = KIMI_ID.exec(written)?.[1];
    return [name === undefined ? this.#newCall(written, '') : { ...this.#newCall(name, ''), id: written }];
  }

  #newCall(name: string, args: string): ToolCallDelta {
    this.#numCalls += 1;
    return { kind: 'tool_call', index: this.#numCalls - 1, name, arguments: args };
  }

  #onText(text: string): (ToolCallDelta | RawToolText)[] {
    switch (this.#state) {
      case 'name':
        this.#name += text;
        return [];
      case 'arguments':
        return text === '' ? [] : [{ kind: 'tool_call', index: this.#numCalls - 1, arguments: text }];
      case 'fence': {
        this.#heldBack += text;
        const match = FENCE_BEGIN.exec(this.#heldBack);
        if (!match) return [];
        this.#state = 'fenced';
        const first = this.#heldBack.slice(match[0].length);
        this.#heldBack = '';
        return [this.#newCall(match[1]!.trim(), ''), ...this.#onText(first)];
      }
      case 'fenced': {
        const all = this.#heldBack + text;
        const end = FENCE_TAIL.exec(all)!.index;
        this.#heldBack = all.slice(end);
        return this.#argumentsOf(all.slice(0, end));
      }
      case 'outside':
        return text.trim() === '' ? [] : [{ kind: 'content', text }];
    }
  }

  #argumentsOf(text: string): ToolCallDelta[] {
    return text === '' ? [] : [{ kind: 'tool_call', index: this.#numCalls - 1, arguments: text }];
  }

  #finishCall(isEnded: boolean): (ToolCallDelta | RawToolText)[] {
    const deltas = this.#onText(this.#text.end());
    this.#text = new Detokenizer(this.#tokenizer);
    const rest = this.#heldBack;
    if (this.#state === 'fenced') deltas.push(...this.#argumentsOf(isEnded ? rest.replace(FENCE_END, '') : rest));
    else if (this.#state === 'fence' && rest) deltas.push({ kind: 'content', text: rest });
    else if (this.#state === 'name' && this.#name) deltas.push({ kind: 'content', text: this.#name });
    if (isEnded && (this.#state === 'fenced' || this.#state === 'arguments')) this.#numEnded += 1;
    this.#state = 'outside';
    this.#name = '';
    this.#heldBack = '';
    return deltas;
  }
}
