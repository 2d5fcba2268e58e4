import {
  choice,
  intersectRanges,
  invertRanges,
  repeat,
  sequence,
  text,
  type CodeRange,
  type GrammarNode,
} from './grammar.js';
import { ESCAPED, type JsonRules } from './json.js';
import { mapClasses, parseRegex, withLength } from './regex.js';
import { SchemaError, type Json } from './schema-error.js';

const SHORT_ESCAPES: Record<number, string> = {
  8: '\\b',
  9: '\\t',
  10: '\\n',
  12: '\\f',
  13: '\\r',
  34: '\\"',
  92: '\\\\',
};
const PLAIN = invertRanges(ESCAPED);
const OCTET = '(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)';
const LABEL = '[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?';
const DATE =
  '[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))';
const TIME = '([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,6})?(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)';

/** Formats, as patterns of which every text is valid; not every valid text is one. */
const FORMATS: Readonly<Record<string, string>> = {
  date: DATE,
  time: TIME,
  'date-time': `${DATE}T${TIME}`,
  duration: 'P(\\d{1,3}D(T\\d{1,3}H)?|\\d{1,3}W|T\\d{1,3}[HMS])',
  email: `[a-z0-9]+([._+-][a-z0-9]+){0,4}@${LABEL}(\\.${LABEL}){1,3}`,
  hostname: `${LABEL}(\\.${LABEL}){0,3}`,
  ipv4: `${OCTET}(\\.${OCTET}){3}`,
  ipv6: '[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}',
  uri: `https?://${LABEL}(\\.${LABEL}){1,3}(/[a-zA-Z0-9._~-]{1,40}){0,8}/?`,
  uuid: '[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}',
};

/** A JSON string that `pattern`, `format`, `minLength` and `maxLength` allow. */
export function stringNode(schema: Json, json: JsonRules, pointer: string): GrammarNode {
  const { pattern, format } = schema as { pattern?: string; format?: string };
  const min = (schema.minLength as number | undefined) ?? 0;
  const max = (schema.maxLength as number | undefined) ?? null;
  if (pattern !== undefined && format !== undefined) {
    throw new SchemaError(`${pointer}/format`, "'pattern' and 'format' together are not supported; keep one of them");
  }
  if (format !== undefined) {
    const known = Object.hasOwn(FORMATS, format) ? FORMATS[format] : undefined;
    if (known === undefined) {
      const names = Object.keys(FORMATS).join(', ');
      throw new SchemaError(`${pointer}/format`, `the format '${format.slice(0, 60)}' is not supported; use ${names}`);
    }
    return quoted(fitted(patternBody(`^${known}$`, pointer), min, max, `${pointer}/format`));
  }
  if (pattern === undefined) return min === 0 && max === null ? json.string : json.stringOf(min, max);
  const at = `${pointer}/pattern`;
  return quoted(fitted(patternBody(pattern, at), min, max, at));
}

/** Texts in which a pattern matches somewhere, of characters as they are. */
export function patternBody(pattern: string, pointer: string): GrammarNode {
  try {
    const any = repeat({ kind: 'class', ranges: [[0, 0x10ffff]] }, 0, null);
    const branches = parseRegex(pattern).map(({ node, startsAtStart, endsAtEnd }) =>
      sequence(...(startsAtStart ? [] : [any]), node, ...(endsAtEnd ? [] : [any])),
    );
    return choice(...branches);
  } catch (error) {
    throw new SchemaError(pointer, `the pattern cannot be used: ${(error as Error).message}`);
  }
}

function fitted(body: GrammarNode, min: number, max: number | null, pointer: string): GrammarNode {
  const node = withLength(flatten(body), min, max);
  if (node) return node;
  throw new SchemaError(
    pointer,
    "it cannot be joined with 'minLength' and 'maxLength'; say the lengths in the pattern",
  );
}

/** Sequences within sequences as one: lengths are then a matter of one item. */
function flatten(node: GrammarNode): GrammarNode {
  if (node.kind === 'choice') return choice(...node.items.map(flatten));
  if (node.kind !== 'sequence') return node;
  const items = node.items.map(flatten).flatMap((item) => (item.kind === 'sequence' ? item.items : [item]));
  return sequence(...items);
}

function quoted(body: GrammarNode): GrammarNode {
  return sequence('"', mapClasses(body, escapedClass), '"');
}

/** Characters as they stand inside a JSON string, each in one way. */
function escapedClass(ranges: readonly CodeRange[]): GrammarNode {
  const plain = intersectRanges(ranges, PLAIN);
  const escapes = intersectRanges(ranges, ESCAPED).flatMap(([first, last]) =>
    Array.from({ length: last - first + 1 }, (_, index) => {
      const point = first + index;
      return text(SHORT_ESCAPES[point] ?? `\\u${point.toString(16).padStart(4, '0')}`);
    }),
  );
  const node: GrammarNode = { kind: 'class', ranges: plain };
  return escapes.length === 0 ? node : choice(...(plain.length === 0 ? [] : [node]), ...escapes);
}

/** An object's key that a pattern matches, written without escapes. */
export function keyNode(body: GrammarNode): GrammarNode {
  const plain = mapClasses(body, (ranges) => ({ kind: 'class', ranges: intersectRanges(ranges, PLAIN) }));
  return sequence('"', plain, '"');
}

/** Any key but these, written without escapes. */
export function keyExcept(names: readonly string[]): GrammarNode {
  const any = repeat({ kind: 'class', ranges: PLAIN }, 0, null);
  const others = (words: string[][]): GrammarNode => {
    if (words.length === 0) return any;
    const groups = new Map<string, string[][]>();
    for (const [first, ...rest] of words) {
      if (first !== undefined) groups.set(first, [...(groups.get(first) ?? []), rest]);
    }
    const firsts = Array.from(groups.keys(), (first): CodeRange => [first.codePointAt(0)!, first.codePointAt(0)!]);
    const different: GrammarNode = { kind: 'class', ranges: intersectRanges(invertRanges(firsts), PLAIN) };
    const isOneOfThem = words.some((word) => word.length === 0);
    return choice(
      ...(isOneOfThem ? [] : ['']),
      sequence(different, any),
      ...Array.from(groups, ([first, rest]) => sequence(first, others(rest))),
    );
  };
  const isPlain = (point: number) => PLAIN.some(([first, last]) => first <= point && point <= last);
  const words = names.map((name) => Array.from(name));
  const writable = words.filter((word) => word.every((character) => isPlain(character.codePointAt(0)!)));
  return sequence('"', others(writable), '"');
}
