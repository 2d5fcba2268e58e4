import {
  choice,
  intersectRanges,
  invertRanges,
  MAX_CODE_POINT,
  normalizeRanges,
  repeat,
  sequence,
  type CodeRange,
  type GrammarNode,
} from './grammar.js';

const DIGITS: CodeRange[] = [[0x30, 0x39]];
const WORD: CodeRange[] = [[0x30, 0x39], [0x41, 0x5a], [0x5f, 0x5f], [0x61, 0x7a]]; // prettier-ignore
const SPACE: CodeRange[] = [
  [9, 13], [0x20, 0x20], [0xa0, 0xa0], [0x1680, 0x1680], [0x2000, 0x200a],
  [0x2028, 0x2029], [0x202f, 0x202f], [0x205f, 0x205f], [0x3000, 0x3000], [0xfeff, 0xfeff],
]; // prettier-ignore
const LINE_ENDS: CodeRange[] = [[10, 10], [13, 13], [0x2028, 0x2029]]; // prettier-ignore
const CONTROL_ESCAPES: Record<string, number> = { n: 10, r: 13, t: 9, v: 11, f: 12, 0: 0 };
const MAX_DEPTH = 64;
const MAX_REPEAT = 10_000;

/** One of the alternatives at the top of a pattern. */
export interface RegexBranch {
  node: GrammarNode;
  startsAtStart: boolean;
  endsAtEnd: boolean;
}

/**
 * A regular expression (of JavaScript, with the flag u) as a grammar: what is regular in it. Throws SyntaxError, in
 * words for the client, for what is not: lookaround, back references, word boundaries, anchors inside.
 */
export function parseRegex(pattern: string): RegexBranch[] {
  try {
    new RegExp(pattern, 'u');
  } catch (error) {
    throw new SyntaxError((error as Error).message);
  }
  return new RegexParser(pattern).parse();
}

/** A pattern that must match a whole text. */
export function wholeRegex(pattern: string): GrammarNode {
  return choice(...parseRegex(pattern).map(({ node }) => node));
}

/** Recursive descent; the pattern is known to be valid. */
class RegexParser {
  readonly #points: string[]; // [num_code_points]
  #at = 0;
  #depth = 0;

  constructor(pattern: string) {
    this.#points = Array.from(pattern);
  }

  parse(): RegexBranch[] {
    const branches: RegexBranch[] = [];
    do {
      let startsAtStart = false;
      while (this.#take('^')) startsAtStart = true;
      const items = this.#items(true);
      let endsAtEnd = false;
      while (this.#take('$')) endsAtEnd = true;
      if (this.#peek() !== undefined && this.#peek() !== '|') throw new SyntaxError("'$' must stand at the end");
      branches.push({ node: sequence(...items), startsAtStart, endsAtEnd });
    } while (this.#take('|'));
    return branches;
  }

  #peek(): string | undefined {
    return this.#points[this.#at];
  }

  #take(expected: string): boolean {
    if (this.#points[this.#at] !== expected) return false;
    this.#at++;
    return true;
  }

  #next(): string {
    return this.#points[this.#at++]!;
  }

  #items(isTop = false): GrammarNode[] {
    const items: GrammarNode[] = [];
    for (let next = this.#peek(); next !== undefined && next !== '|' && next !== ')'; next = this.#peek()) {
      if (next === '$' && isTop) break;
      if (next === '^' || next === '$') throw new SyntaxError(`'${next}' is supported at the ends of a pattern alone`);
      items.push(this.#quantified(this.#atom()));
    }
    return items;
  }

  #group(): GrammarNode {
    if (++this.#depth > MAX_DEPTH) throw new SyntaxError(`groups are nested deeper than ${MAX_DEPTH}`);
    if (this.#take('?')) {
      const kind = this.#next();
      if (kind === '<' && this.#peek() !== '=' && this.#peek() !== '!') while (this.#next() !== '>');
      else if (kind !== ':') throw new SyntaxError('lookaround and inline flags are not supported');
    }
    const branches: GrammarNode[] = [];
    do branches.push(sequence(...this.#items()));
    while (this.#take('|'));
    this.#at++; // the closing parenthesis
    this.#depth--;
    return choice(...branches);
  }

  #atom(): GrammarNode {
    const character = this.#next();
    switch (character) {
      case '(':
        return this.#group();
      case '[':
        return { kind: 'class', ranges: this.#class() };
      case '.':
        return { kind: 'class', ranges: invertRanges(LINE_ENDS) };
      case '\\':
        if (this.#peek() === 'b' || this.#peek() === 'B') throw new SyntaxError('word boundaries are not supported');
        return { kind: 'class', ranges: this.#escape() };
      default:
        return { kind: 'class', ranges: pointOf(character) };
    }
  }

  #quantified(item: GrammarNode): GrammarNode {
    const next = this.#peek();
    if (next !== '*' && next !== '+' && next !== '?' && next !== '{') return item;
    this.#at++;
    let node: GrammarNode;
    if (next === '*') node = repeat(item, 0, null);
    else if (next === '+') node = repeat(item, 1, null);
    else if (next === '?') node = repeat(item, 0, 1);
    else {
      const end = this.#points.indexOf('}', this.#at);
      const [min, max] = this.#points.slice(this.#at, end).join('').split(',') as [string, string?];
      this.#at = end + 1;
      if (Number(min) > MAX_REPEAT || Number(max) > MAX_REPEAT) {
        throw new SyntaxError(`a repetition has more than ${MAX_REPEAT} rounds`);
      }
      node = repeat(item, Number(min), max === undefined ? Number(min) : max === '' ? null : Number(max));
    }
    this.#take('?'); // lazy or greedy, the same texts match
    return node;
  }

  #class(): CodeRange[] {
    const isNegated = this.#take('^');
    const ranges: CodeRange[] = [];
    while (!this.#take(']')) {
      const first = this.#classAtom();
      if (this.#peek() === '-' && this.#points[this.#at + 1] !== ']') {
        this.#at++;
        const last = this.#classAtom();
        ranges.push([first[0]![0], last[0]![0]]);
      } else ranges.push(...first);
    }
    return isNegated ? invertRanges(ranges) : normalizeRanges(ranges);
  }

  #classAtom(): CodeRange[] {
    const character = this.#next();
    if (character !== '\\') return pointOf(character);
    if (this.#take('b')) return [[8, 8]];
    return this.#escape();
  }

  #escape(): CodeRange[] {
    const character = this.#next();
    switch (character) {
      case 'd':
        return DIGITS;
      case 'D':
        return invertRanges(DIGITS);
      case 'w':
        return WORD;
      case 'W':
        return invertRanges(WORD);
      case 's':
        return SPACE;
      case 'S':
        return invertRanges(SPACE);
      case 'p':
      case 'P':
        throw new SyntaxError('classes of Unicode properties are not supported; name the characters');
      case 'c':
        return [[this.#next().codePointAt(0)! % 32, this.#points[this.#at - 1]!.codePointAt(0)! % 32]];
      case 'x':
        return this.#hex(2);
      case 'u':
        return this.#unicode();
      case 'k':
        throw new SyntaxError('back references are not supported');
      default:
        if (character in CONTROL_ESCAPES) return [[CONTROL_ESCAPES[character]!, CONTROL_ESCAPES[character]!]];
        if (character >= '1' && character <= '9') throw new SyntaxError('back references are not supported');
        return pointOf(character);
    }
  }

  #hex(length: number): CodeRange[] {
    const value = parseInt(this.#points.slice(this.#at, this.#at + length).join(''), 16);
    this.#at += length;
    return [[value, value]];
  }

  #unicode(): CodeRange[] {
    if (this.#take('{')) {
      const end = this.#points.indexOf('}', this.#at);
      const ranges = this.#hex(end - this.#at);
      this.#at++;
      return ranges;
    }
    const [[unit]] = this.#hex(4) as [[number, number]];
    const isHigh = unit >= 0xd800 && unit <= 0xdbff;
    if (isHigh && this.#peek() === '\\' && this.#points[this.#at + 1] === 'u') {
      const low = parseInt(this.#points.slice(this.#at + 2, this.#at + 6).join(''), 16);
      if (low >= 0xdc00 && low <= 0xdfff) {
        this.#at += 6;
        const point = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
        return [[point, point]];
      }
    }
    return [[unit, unit]];
  }
}

function pointOf(character: string): CodeRange[] {
  const point = character.codePointAt(0)!;
  return [[point, point]];
}

/** How many code points texts of a pattern have: [fewest, most]; null: no limit. */
export function lengthOf(node: GrammarNode): [number, number | null] {
  switch (node.kind) {
    case 'text': {
      const { length } = Array.from(node.text);
      return [length, length];
    }
    case 'class':
    case 'control':
      return [1, 1];
    case 'sequence':
      return node.items
        .map(lengthOf)
        .reduce<[number, number | null]>(
          ([min, max], [least, most]) => [min + least, max === null || most === null ? null : max + most],
          [0, 0],
        );
    case 'choice': {
      const lengths = node.items.map(lengthOf);
      return [
        Math.min(...lengths.map(([least]) => least)),
        lengths.some(([, most]) => most === null) ? null : Math.max(...lengths.map(([, most]) => most!)),
      ];
    }
    case 'repeat': {
      const [least, most] = lengthOf(node.item);
      return [least * node.min, most === 0 ? 0 : most === null || node.max === null ? null : most * node.max];
    }
    case 'rule':
      return [0, null];
  }
}

/** The same texts as far as they have a length between two limits; null where that is no matter of one repetition. */
export function withLength(node: GrammarNode, min: number, max: number | null): GrammarNode | null {
  const [least, most] = lengthOf(node);
  const isWithin = least >= min && (max === null || (most !== null && most <= max));
  if (isWithin) return node;
  if (max !== null && least > max) return choice();
  if (node.kind === 'choice') {
    const branches = node.items.map((item) => withLength(item, min, max));
    return branches.includes(null) ? null : choice(...(branches as GrammarNode[]));
  }
  const items = node.kind === 'sequence' ? node.items : [node];
  const index = items.findIndex((item) => lengthOf(item)[0] !== lengthOf(item)[1]);
  const flexible = items[index];
  if (flexible === undefined) return most !== null && most < min ? choice() : null;
  const rest = items.filter((_, at) => at !== index).map(lengthOf);
  if (rest.some(([shortest, longest]) => shortest !== longest)) return null;
  const fixed = rest.reduce((sum, [length]) => sum + length, 0);
  const [low, high] = [Math.max(0, min - fixed), max === null ? null : max - fixed];
  let fitted: GrammarNode | null;
  if (flexible.kind === 'repeat' && String(lengthOf(flexible.item)) === '1,1') {
    const last = high === null ? flexible.max : Math.min(high, flexible.max ?? Infinity);
    fitted = repeat(flexible.item, Math.max(low, flexible.min), last);
  } else fitted = flexible === node ? null : withLength(flexible, low, high);
  return fitted && sequence(...items.map((item, at) => (at === index ? fitted : item)));
}

/** Every character of a pattern put through `write`: how it looks inside a JSON string, for one. */
export function mapClasses(node: GrammarNode, write: (ranges: readonly CodeRange[]) => GrammarNode): GrammarNode {
  switch (node.kind) {
    case 'class':
      return write(intersectRanges(node.ranges, [[0, MAX_CODE_POINT]]));
    case 'sequence':
    case 'choice':
      return { kind: node.kind, items: node.items.map((item) => mapClasses(item, write)) };
    case 'repeat':
      return { ...node, item: mapClasses(node.item, write) };
    case 'text':
    case 'control':
    case 'rule':
      return node;
  }
}
