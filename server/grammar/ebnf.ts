import {
  choice,
  GrammarBuilder,
  invertRanges,
  normalizeRanges,
  repeat,
  sequence,
  text,
  type CodeRange,
  type Grammar,
  type GrammarNode,
} from './grammar.js';
import { productivePart } from './productive.js';

const MAX_SOURCE = 64 * 1024;
const MAX_DEPTH = 64;
const MAX_REPEAT = 10_000;
const ESCAPES: Record<string, number> = { n: 10, r: 13, t: 9, '0': 0, '"': 34, "'": 39, '\\': 92, '[': 91, ']': 93, '-': 45, '^': 94 }; // prettier-ignore

/**
 * A grammar as llama.cpp (GBNF) and XGrammar (EBNF) write it: `name ::= expression`, with "text", [classes], `.`,
 * groups, `|`, `*`, `+`, `?`, `{m,n}` and # comments; the first line's or `root` begins. Throws SyntaxError with the
 * line.
 */
export function parseEbnf(source: string): Grammar {
  if (source.length > MAX_SOURCE) throw new SyntaxError(`it has more than ${MAX_SOURCE} characters`);
  const grammar = productivePart(new EbnfParser(source).parse());
  if (grammar === null) throw new SyntaxError('no text of finite length fits it');
  return grammar;
}

interface Named {
  reference: { kind: 'rule'; index: number };
  isDefined: boolean;
  line: number;
}

class EbnfParser {
  readonly #source: string;
  readonly #builder = new GrammarBuilder();
  readonly #names = new Map<string, Named>();
  #at = 0;
  #depth = 0;

  constructor(source: string) {
    this.#source = source;
  }

  parse(): Grammar {
    this.#skipSpace();
    while (this.#at < this.#source.length) {
      const name = this.#match(/[A-Za-z_][A-Za-z0-9_-]*/y) ?? this.#fail('a rule begins with its name');
      this.#skipSpace();
      if (this.#match(/::=/y) === null) this.#fail(`'::=' is missing behind '${name.slice(0, 60)}'`);
      const rule = this.#named(name);
      if (rule.isDefined) this.#fail(`the rule '${name.slice(0, 60)}' is defined twice`);
      rule.isDefined = true;
      this.#builder.define(rule.reference, this.#choice());
    }
    for (const [name, { isDefined, line }] of this.#names) {
      if (!isDefined) throw new SyntaxError(`line ${line}: the rule '${name.slice(0, 60)}' is not defined`);
    }
    const root = this.#names.get('root');
    if (root === undefined) throw new SyntaxError("there is no rule 'root'");
    return this.#builder.build(root.reference);
  }

  get #line(): number {
    return this.#source.slice(0, this.#at).split('\n').length;
  }

  #fail(problem: string): never {
    throw new SyntaxError(`line ${this.#line}: ${problem}`);
  }

  #named(name: string): Named {
    let rule = this.#names.get(name);
    if (rule === undefined) {
      rule = { reference: this.#builder.declare(), isDefined: false, line: this.#line };
      this.#names.set(name, rule);
    }
    return rule;
  }

  #match(pattern: RegExp): string | null {
    pattern.lastIndex = this.#at;
    const [found] = pattern.exec(this.#source) ?? [null];
    if (found !== null) this.#at += found.length;
    return found;
  }

  #skipSpace(): void {
    this.#match(/(?:\s|#[^\n]*)*/y);
  }

  #choice(): GrammarNode {
    if (++this.#depth > MAX_DEPTH) this.#fail(`groups are nested deeper than ${MAX_DEPTH}`);
    const branches: GrammarNode[] = [];
    do {
      const items: GrammarNode[] = [];
      for (let item = this.#item(); item !== null; item = this.#item()) items.push(item);
      branches.push(sequence(...items));
    } while (this.#match(/\|/y) !== null);
    this.#depth--;
    return choice(...branches);
  }

  /** null where the sequence ends */
  #item(): GrammarNode | null {
    this.#skipSpace();
    const atom = this.#atom();
    if (atom === null) return null;
    let node = atom;
    for (;;) {
      const mark = this.#match(/[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\}/y);
      if (mark === null) break;
      if (mark === '*') node = repeat(node, 0, null);
      else if (mark === '+') node = repeat(node, 1, null);
      else if (mark === '?') node = repeat(node, 0, 1);
      else {
        const [min, max] = mark
          .slice(1, -1)
          .split(',')
          .map((part) => part.trim()) as [string, string?];
        if (Number(min) > MAX_REPEAT || Number(max) > MAX_REPEAT) this.#fail(`more than ${MAX_REPEAT} rounds`);
        node = repeat(node, Number(min), max === undefined ? Number(min) : max === '' ? null : Number(max));
      }
    }
    this.#skipSpace();
    return node;
  }

  #atom(): GrammarNode | null {
    const next = this.#source[this.#at];
    if (next === '"' || next === "'") return this.#literal(next);
    if (next === '[') return this.#class();
    if (next === '(') {
      this.#at++;
      const node = this.#choice();
      if (this.#match(/\)/y) === null) this.#fail("')' is missing");
      return node;
    }
    if (this.#match(/\./y) !== null) return { kind: 'class', ranges: invertRanges([[10, 10]]) };
    const start = this.#at;
    const name = this.#match(/[A-Za-z_][A-Za-z0-9_-]*/y);
    if (name === null) {
      if (next !== undefined && !'|)'.includes(next)) this.#fail(`'${next}' is not understood here`);
      return null;
    }
    this.#skipSpace();
    if (this.#source.startsWith('::=', this.#at)) {
      this.#at = start; // the next rule
      return null;
    }
    return this.#named(name).reference;
  }

  #literal(quote: string): GrammarNode {
    this.#at++;
    let value = '';
    for (;;) {
      const next = this.#source[this.#at];
      if (next === undefined || next === '\n') this.#fail('a text is not closed');
      if (next === quote) break;
      value += String.fromCodePoint(this.#character());
    }
    this.#at++;
    return text(value);
  }

  #class(): GrammarNode {
    this.#at++;
    const isNegated = this.#match(/\^/y) !== null;
    const ranges: CodeRange[] = [];
    while (this.#match(/\]/y) === null) {
      if (this.#at >= this.#source.length) this.#fail('a class is not closed');
      const first = this.#character();
      const last = this.#match(/-(?!\])/y) === null ? first : this.#character();
      if (last < first) this.#fail('a range of a class is upside down');
      ranges.push([first, last]);
    }
    return { kind: 'class', ranges: isNegated ? invertRanges(ranges) : normalizeRanges(ranges) };
  }

  #character(): number {
    const point = this.#source.codePointAt(this.#at);
    if (point === undefined) this.#fail('it ends too early');
    this.#at += point > 0xffff ? 2 : 1;
    if (point !== 0x5c) return point;
    const hex = this.#match(/x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}/y);
    const value = hex === null ? ESCAPES[this.#match(/./y) ?? ''] : parseInt(hex.slice(1), 16);
    if (value === undefined || value > 0x10ffff) this.#fail('an escape is not known');
    return value;
  }
}
