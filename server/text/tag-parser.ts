import { Detokenizer } from './detokenizer.js';
import type { LabelledToken, OutputDelta, TokenParser } from './output-parser.js';
import { StopMatcher } from './stop-matcher.js';
import type { Tokenizer } from './tokenizer.js';

const THINK = '<think>';
const THINK_END = '</think>';
const ANSWER = '<answer>';
const ANSWER_END = '</answer>';

/**
 * R1-Zero's form, `<think>...</think> <answer>...</answer>`, which is plain text: tags are found by their letters.
 * Whitespace around tags belongs to them. Text without these tags is content. The answer's end ends the completion.
 */
export class TagParser implements TokenParser {
  readonly #tokenizer: Tokenizer;
  /** ids whose text is shown although they may be special */
  readonly #shownIds: ReadonlySet<number>;
  readonly #text: Detokenizer;
  readonly #stops: StopMatcher;
  #state: 'lead' | 'think' | 'between' | 'answer' | 'plain' | 'done' = 'lead';
  #heldBack = '';
  #hasText = false;

  constructor(tokenizer: Tokenizer, stops: readonly string[]) {
    this.#tokenizer = tokenizer;
    this.#shownIds = new Set([THINK, THINK_END, ANSWER, ANSWER_END].map((tag) => tokenizer.addedId(tag)));
    this.#text = new Detokenizer(tokenizer);
    this.#stops = new StopMatcher(stops);
  }

  get matchedStop(): string | null {
    return this.#state === 'done' ? ANSWER_END : this.#stops.matched;
  }

  get numToolCalls(): number {
    return 0;
  }

  get numEndedCalls(): number {
    return 0;
  }

  get phase(): LabelledToken['phase'] {
    return this.#state === 'think' ? 'reasoning' : this.#state === 'lead' ? 'control' : 'answer';
  }

  push({ id, phase }: LabelledToken): OutputDelta[] {
    if (phase === 'control') return [];
    if (this.#tokenizer.isSpecial(id) && !this.#shownIds.has(id)) return [];
    const deltas: OutputDelta[] = [];
    this.#heldBack += this.#text.push(id);
    while (this.#advance(deltas));
    return deltas;
  }

  end(): OutputDelta[] {
    const deltas: OutputDelta[] = [];
    this.#heldBack += this.#text.end();
    while (this.#advance(deltas));
    const kind = this.#state === 'think' ? 'reasoning' : 'content';
    const isSpace = this.#heldBack.trim() === '';
    if (this.#state !== 'done' && !isSpace) this.#emit(deltas, kind, this.#heldBack);
    this.#heldBack = '';
    const rest = this.#stops.end();
    if (rest !== '') deltas.push({ kind: 'content', text: rest });
    return deltas;
  }

  /** One step over what is held back; whether there may be another. */
  #advance(deltas: OutputDelta[]): boolean {
    switch (this.#state) {
      case 'lead':
      case 'between':
        return this.#openTag();
      case 'think':
        return this.#takeUntil(deltas, THINK_END, 'reasoning', 'between');
      case 'answer':
        return this.#takeUntil(deltas, ANSWER_END, 'content', 'done');
      case 'plain':
        this.#emit(deltas, 'content', this.#heldBack);
        this.#heldBack = '';
        return false;
      case 'done':
        return false;
    }
  }

  #openTag(): boolean {
    const text = this.#heldBack.trimStart();
    const tags = this.#state === 'lead' ? [THINK, ANSWER] : [ANSWER];
    const tag = tags.find((candidate) => text.startsWith(candidate));
    if (tag === undefined && tags.some((candidate) => candidate.startsWith(text))) return false;
    this.#state = tag === THINK ? 'think' : tag === ANSWER ? 'answer' : 'plain';
    this.#hasText = false;
    // What follows reasoning without a tag loses the line breaks between, what begins without one loses nothing.
    if (tag !== undefined) this.#heldBack = text.slice(tag.length);
    return true;
  }

  #takeUntil(deltas: OutputDelta[], tag: string, kind: 'reasoning' | 'content', next: 'between' | 'done'): boolean {
    if (!this.#hasText) this.#heldBack = this.#heldBack.trimStart();
    const end = this.#heldBack.indexOf(tag);
    if (end >= 0) {
      this.#emit(deltas, kind, this.#heldBack.slice(0, end).trimEnd());
      this.#heldBack = this.#heldBack.slice(end + tag.length);
      this.#state = next;
      return true;
    }
    const safe = this.#heldBack.slice(0, this.#heldBack.length - partOfTag(this.#heldBack, tag)).trimEnd();
    this.#emit(deltas, kind, safe);
    this.#heldBack = this.#heldBack.slice(safe.length);
    return false;
  }

  #emit(deltas: OutputDelta[], kind: 'reasoning' | 'content', text: string): void {
    if (text === '') return;
    this.#hasText = true;
    const shown = kind === 'content' ? this.#stops.push(text) : text;
    if (shown !== '') deltas.push({ kind, text: shown });
  }
}

/** Length of the text's end that the tag may begin with. */
function partOfTag(text: string, tag: string): number {
  for (let length = Math.min(tag.length - 1, text.length); length > 0; length--) {
    if (tag.startsWith(text.slice(-length))) return length;
  }
  return 0;
}
