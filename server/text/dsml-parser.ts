import { Detokenizer } from './detokenizer.js';
import type { RawToolText, ToolCallDelta, ToolPhaseParser } from './tool-call-parser.js';
import type { Tokenizer } from './tokenizer.js';

type Delta = ToolCallDelta | RawToolText;

/** Before a mark the tag's `<` or `</` is still text. */
const TAG_BEGIN = /<\/?$/;
const INVOKE = /^invoke\s+name="([^"]*)"\s*$/;
const PARAMETER = /^parameter\s+name="([^"]*)"(?:\s+string="(true|false)")?\s*$/;

/**
 * Calls as V3.2 writes them: `<M invoke name="f">`, `<M parameter name="k" string="true">v</M parameter>`, where M is
 * one token, so that text can hold anything else. The first mark of the tool phase is a phase marker and never gets
 * here: parsing begins inside a tag. Parameters become one JSON object, handed out as they come.
 */
export class DsmlParser implements ToolPhaseParser {
  readonly #tokenizer: Tokenizer;
  readonly #mark: number;
  #text: Detokenizer;
  #state: 'outside' | 'tag' | 'value' = 'tag';
  #isClosing = false;
  /** the tag's text so far; in a value what may be the next tag's beginning */
  #heldBack = '';
  #isString = false;
  #isInCall = false;
  #numParameters = 0;
  #numCalls = 0;
  #numEnded = 0;

  constructor(tokenizer: Tokenizer, mark: number) {
    this.#tokenizer = tokenizer;
    this.#mark = mark;
    this.#text = new Detokenizer(tokenizer);
  }

  get numCalls(): number {
    return this.#numCalls;
  }

  get numEnded(): number {
    return this.#numEnded;
  }

  push(id: number): Delta[] {
    if (id === this.#mark) return this.#onMark();
    return this.#tokenizer.isSpecial(id) ? [] : this.#onText(this.#text.push(id));
  }

  /** A call that is cut short keeps what there is. */
  end(): Delta[] {
    const deltas = this.#onText(this.#text.end());
    if (this.#state === 'value') deltas.push(...this.#value(this.#heldBack));
    else if (this.#state === 'tag' && !this.#isInCall && this.#heldBack !== '') {
      deltas.push({ kind: 'content', text: this.#heldBack });
    }
    this.#text = new Detokenizer(this.#tokenizer);
    this.#state = 'tag';
    this.#isClosing = false;
    this.#isInCall = false;
    this.#heldBack = '';
    return deltas;
  }

  #onMark(): Delta[] {
    const deltas = this.#onText(this.#text.end());
    this.#text = new Detokenizer(this.#tokenizer);
    const begin = TAG_BEGIN.exec(this.#heldBack)?.[0];
    if (this.#state === 'value' && begin !== '</') {
      // No tag may begin inside a value: the mark is lost, the text around it is kept.
      deltas.push(...this.#value(this.#heldBack));
      this.#heldBack = '';
      return deltas;
    }
    this.#isClosing = begin === '</';
    this.#state = 'tag';
    this.#heldBack = '';
    return deltas;
  }

  #onText(text: string): Delta[] {
    const all = this.#heldBack + text;
    switch (this.#state) {
      case 'outside': {
        this.#heldBack = TAG_BEGIN.exec(all)?.[0] ?? '';
        const raw = all.slice(0, all.length - this.#heldBack.length);
        return raw.trim() === '' ? [] : [{ kind: 'content', text: raw }];
      }
      case 'value': {
        this.#heldBack = TAG_BEGIN.exec(all)?.[0] ?? '';
        return this.#value(all.slice(0, all.length - this.#heldBack.length));
      }
      case 'tag': {
        const end = all.indexOf('>');
        this.#heldBack = end < 0 ? all : '';
        if (end < 0) return [];
        return [...this.#onTag(all.slice(0, end)), ...this.#onText(all.slice(end + 1))];
      }
    }
  }

  #onTag(tag: string): Delta[] {
    this.#state = 'outside';
    const invoke = INVOKE.exec(tag);
    if (invoke && !this.#isClosing) {
      this.#isInCall = true;
      this.#numParameters = 0;
      this.#numCalls += 1;
      return [{ ...this.#delta(''), name: invoke[1]! }];
    }
    if (tag.trim() === 'invoke' && this.#isInCall) {
      this.#isInCall = false;
      this.#numEnded += 1;
      return [this.#delta(this.#numParameters === 0 ? '{}' : '}')];
    }
    const parameter = PARAMETER.exec(tag);
    if (parameter && !this.#isClosing && this.#isInCall) {
      this.#state = 'value';
      this.#isString = parameter[2] !== 'false';
      const lead = this.#numParameters++ === 0 ? '{' : ', ';
      return [this.#delta(`${lead}${JSON.stringify(parameter[1])}: ${this.#isString ? '"' : ''}`)];
    }
    if (tag.trim() === 'parameter' && this.#isClosing && this.#isString && this.#isInCall) return [this.#delta('"')];
    return [];
  }

  #value(text: string): Delta[] {
    if (text === '') return [];
    return [this.#delta(this.#isString ? JSON.stringify(text).slice(1, -1) : text)];
  }

  #delta(args: string): ToolCallDelta {
    return { kind: 'tool_call', index: this.#numCalls - 1, arguments: args };
  }
}
