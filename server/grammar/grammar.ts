/** A context-free grammar over code points and control tokens: plain values that can cross a process boundary. */
export type GrammarNode =
  | { kind: 'text'; text: string }
  /** one code point of these ranges */
  | { kind: 'class'; ranges: CodeRange[] }
  /** one token of tokenizer.json's added tokens; no text can stand for it */
  | { kind: 'control'; tokenId: number }
  | { kind: 'sequence'; items: GrammarNode[] }
  /** without items: nothing matches */
  | { kind: 'choice'; items: GrammarNode[] }
  | { kind: 'repeat'; item: GrammarNode; min: number; max: number | null }
  | { kind: 'rule'; index: number };

/** first and last code point, both included */
export type CodeRange = readonly [first: number, last: number];

export interface Grammar {
  /** rule 0 is the root */
  rules: GrammarNode[]; // [num_rules]
}

export const MAX_CODE_POINT = 0x10ffff;
export const NOTHING: GrammarNode = { kind: 'choice', items: [] };

export function text(value: string): GrammarNode {
  return { kind: 'text', text: value };
}

export function sequence(...items: (GrammarNode | string)[]): GrammarNode {
  const nodes = items.map((item) => (typeof item === 'string' ? text(item) : item));
  return nodes.length === 1 ? nodes[0]! : { kind: 'sequence', items: nodes };
}

export function choice(...items: (GrammarNode | string)[]): GrammarNode {
  const nodes = items.map((item) => (typeof item === 'string' ? text(item) : item));
  return nodes.length === 1 ? nodes[0]! : { kind: 'choice', items: nodes };
}

export function repeat(item: GrammarNode | string, min: number, max: number | null): GrammarNode {
  return { kind: 'repeat', item: typeof item === 'string' ? text(item) : item, min, max };
}

/** A class written as in a regular expression's brackets, with single characters and `a-z` alone. */
export function chars(spec: string): GrammarNode {
  const points = Array.from(spec, (character) => character.codePointAt(0)!);
  const ranges: CodeRange[] = [];
  for (let i = 0; i < points.length; i++) {
    const isRange = points[i + 1] === 0x2d && i + 2 < points.length;
    ranges.push([points[i]!, points[isRange ? i + 2 : i]!]);
    if (isRange) i += 2;
  }
  return { kind: 'class', ranges };
}

export const DIGIT: GrammarNode = chars('0-9');

/** Collects rules; references may come before definitions. */
export class GrammarBuilder {
  readonly #rules: GrammarNode[] = [NOTHING]; // [num_rules]

  get numRules(): number {
    return this.#rules.length;
  }

  /** A reference to a rule that define() fills. */
  declare(): { kind: 'rule'; index: number } {
    return { kind: 'rule', index: this.#rules.push(NOTHING) - 1 };
  }

  define(reference: { index: number }, node: GrammarNode): void {
    this.#rules[reference.index] = node;
  }

  /** A rule of its own, so that a node that is used often is kept once. */
  rule(node: GrammarNode): GrammarNode {
    const reference = this.declare();
    this.define(reference, node);
    return reference;
  }

  build(root: GrammarNode): Grammar {
    this.#rules[0] = root;
    return { rules: this.#rules };
  }
}

/** Sorted and joined ranges that hold the same code points. */
export function normalizeRanges(ranges: readonly CodeRange[]): CodeRange[] {
  const sorted = ranges.filter(([first, last]) => first <= last).sort((a, b) => a[0] - b[0]);
  const joined: [number, number][] = [];
  for (const [first, last] of sorted) {
    const previous = joined.at(-1);
    if (previous && first <= previous[1] + 1) previous[1] = Math.max(previous[1], last);
    else joined.push([first, last]);
  }
  return joined;
}

/** Every code point that is in none of the ranges. */
export function invertRanges(ranges: readonly CodeRange[]): CodeRange[] {
  const inverse: CodeRange[] = [];
  let next = 0;
  for (const [first, last] of normalizeRanges(ranges)) {
    if (first > next) inverse.push([next, first - 1]);
    next = last + 1;
  }
  if (next <= MAX_CODE_POINT) inverse.push([next, MAX_CODE_POINT]);
  return inverse;
}

export function intersectRanges(some: readonly CodeRange[], others: readonly CodeRange[]): CodeRange[] {
  return normalizeRanges(
    some.flatMap(([first, last]) =>
      others.map(([start, end]): CodeRange => [Math.max(first, start), Math.min(last, end)]),
    ),
  );
}
