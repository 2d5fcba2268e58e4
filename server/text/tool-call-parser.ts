import { Detokenizer } from './detokenizer.js';
import type { Tokenizer } from './tokenizer.js';

/** Token ids inside a tool phase; -1 where the vocabulary has no such token. */
export interface ToolMarkers {
  callBegin: number;
  callEnd: number;
  separator: number;
}

export interface ToolCallDelta {
  kind: 'tool_call';
  /** position among the calls of this answer, from 0 */
  index: number;
  /** set once, in a call's first delta */
  name?: string;
  arguments: string;
}

/** Text of a tool phase that is no well-formed call: the client gets it as content. */
export interface RawToolText {
  kind: 'content';
  text: string;
}

/** V3 and R1 write `function<sep>NAME\n```json\n{...}\n```; V3.1 writes `NAME<sep>{...}`. */
const FENCED_CALL = /^([^\n]+)\n```json\n([\s\S]*?)\n?```\s*$/;

/**
 * Tokens of a tool phase -> calls. Marks are known by id, so text can hold anything. V3.1 arguments stream; a
 * fenced call comes whole when it ends.
 */
export class ToolCallParser {
  readonly #tokenizer: Tokenizer;
  readonly #markers: ToolMarkers;
  #state: 'outside' | 'name' | 'arguments' | 'fenced' = 'outside';
  #text: Detokenizer;
  #name = '';
  #fenced = '';
  #numCalls = 0;

  constructor(tokenizer: Tokenizer, markers: ToolMarkers) {
    this.#tokenizer = tokenizer;
    this.#markers = markers;
    this.#text = new Detokenizer(tokenizer);
  }

  get numCalls(): number {
    return this.#numCalls;
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

  /** the tool phase is over: what is unfinished is handed out */
  end(): (ToolCallDelta | RawToolText)[] {
    return this.#finishCall(false);
  }

  #beginArguments(): ToolCallDelta[] {
    this.#name += this.#text.end();
    if (this.#name.trim() === 'function') {
      this.#state = 'fenced';
      return [];
    }
    this.#state = 'arguments';
    this.#numCalls += 1;
    return [{ kind: 'tool_call', index: this.#numCalls - 1, name: this.#name.trim(), arguments: '' }];
  }

  #onText(text: string): (ToolCallDelta | RawToolText)[] {
    switch (this.#state) {
      case 'name':
        this.#name += text;
        return [];
      case 'fenced':
        this.#fenced += text;
        return [];
      case 'arguments':
        return text === '' ? [] : [{ kind: 'tool_call', index: this.#numCalls - 1, arguments: text }];
      case 'outside':
        return text.trim() === '' ? [] : [{ kind: 'content', text }];
    }
  }

  #finishCall(isEnded: boolean): (ToolCallDelta | RawToolText)[] {
    const deltas = this.#onText(this.#text.end());
    this.#text = new Detokenizer(this.#tokenizer);
    if (this.#state === 'fenced') {
      const match = FENCED_CALL.exec(this.#fenced);
      if (isEnded && match) {
        this.#numCalls += 1;
        deltas.push({ kind: 'tool_call', index: this.#numCalls - 1, name: match[1]!.trim(), arguments: match[2]! });
      } else if (this.#fenced) {
        deltas.push({ kind: 'content', text: this.#fenced });
      }
    } else if (this.#state === 'name' && this.#name) {
      deltas.push({ kind: 'content', text: this.#name });
    }
    this.#state = 'outside';
    this.#name = '';
    this.#fenced = '';
    return deltas;
  }
}
