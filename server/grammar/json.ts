import {
  chars,
  choice,
  DIGIT,
  GrammarBuilder,
  invertRanges,
  repeat,
  sequence,
  text,
  type CodeRange,
  type GrammarNode,
} from './grammar.js';

/** Code points that a JSON string cannot hold as they are. */
export const ESCAPED: readonly CodeRange[] = [
  [0, 0x1f],
  [0x22, 0x22],
  [0x5c, 0x5c],
];
/** Integers of so many digits are exact in every JSON reader. */
export const MAX_DIGITS = 15;
const MAX_INDENT = 32;

/** Rules for JSON's own parts, each made once. Numbers stay finite, strings never hold half a surrogate pair. */
export class JsonRules {
  readonly builder: GrammarBuilder;
  readonly #made = new Map<string, GrammarNode>();

  constructor(builder: GrammarBuilder) {
    this.builder = builder;
  }

  /** Nothing, one space, or a line break with indentation. */
  get space(): GrammarNode {
    return this.#once('space', () => choice('', ' ', sequence('\n', repeat(chars(' \t'), 0, MAX_INDENT))));
  }

  /** One character of a string, escaped or not. */
  get character(): GrammarNode {
    return this.#once('character', () => {
      const hex = chars('0-9a-fA-F');
      const unit = choice(sequence(chars('0-9a-cefA-CEF'), hex), sequence(chars('dD'), chars('0-7')));
      const pair = sequence(
        '\\u',
        chars('dD'),
        chars('89abAB'),
        hex,
        hex,
        '\\u',
        chars('dD'),
        chars('c-fC-F'),
        hex,
        hex,
      );
      return choice(
        { kind: 'class', ranges: invertRanges(ESCAPED) },
        sequence('\\', chars('"\\/bfnrt')),
        sequence('\\u', unit, hex, hex),
        pair,
      );
    });
  }

  get string(): GrammarNode {
    return this.#once('string', () => this.stringOf(0, null));
  }

  /** A string of so many code points. */
  stringOf(min: number, max: number | null): GrammarNode {
    return sequence('"', repeat(this.character, min, max), '"');
  }

  get integer(): GrammarNode {
    return this.#once('integer', () =>
      sequence(choice('', '-'), choice('0', sequence(chars('1-9'), repeat(DIGIT, 0, MAX_DIGITS - 1)))),
    );
  }

  get number(): GrammarNode {
    return this.#once('number', () =>
      sequence(
        this.integer,
        repeat(sequence('.', repeat(DIGIT, 1, MAX_DIGITS)), 0, 1),
        repeat(sequence(chars('eE'), repeat(chars('+-'), 0, 1), repeat(DIGIT, 1, 2)), 0, 1),
      ),
    );
  }

  /** Any JSON value. */
  get value(): GrammarNode {
    const known = this.#made.get('value');
    if (known) return known;
    const reference = this.builder.declare();
    this.#made.set('value', reference);
    this.builder.define(reference, choice(this.object, this.array, this.string, this.number, 'true', 'false', 'null'));
    return reference;
  }

  /** Any JSON object. */
  get object(): GrammarNode {
    return this.#once('object', () => this.members(sequence(this.string, ':', this.space, this.value), 0, null));
  }

  get array(): GrammarNode {
    return this.#once('array', () => this.elements(this.value, 0, null));
  }

  members(member: GrammarNode, min: number, max: number | null): GrammarNode {
    return sequence('{', this.list(member, min, max), '}');
  }

  elements(element: GrammarNode, min: number, max: number | null): GrammarNode {
    return sequence('[', this.list(element, min, max), ']');
  }

  /** What stands between brackets: elements with commas, and space around them. */
  list(element: GrammarNode, min: number, max: number | null): GrammarNode {
    const item = this.builder.rule(element);
    if (max === 0) return min === 0 ? this.space : choice();
    const rest = repeat(this.following(item), Math.max(0, min - 1), max === null ? null : max - 1);
    const some = sequence(this.space, item, rest, this.space);
    return min === 0 ? choice('', some) : some;
  }

  following(element: GrammarNode): GrammarNode {
    return sequence(',', this.space, element);
  }

  /** A value written out. */
  literal(value: unknown): GrammarNode {
    return text(JSON.stringify(value));
  }

  #once(name: string, make: () => GrammarNode): GrammarNode {
    const known = this.#made.get(name);
    if (known) return known;
    const reference = this.builder.declare();
    this.#made.set(name, reference);
    this.builder.define(reference, make());
    return reference;
  }
}
