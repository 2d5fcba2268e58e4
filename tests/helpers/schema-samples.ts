import type { Grammar, GrammarNode } from '../../server/grammar/grammar.js';

/** Whole numbers below a bound, the same for the same seed. */
export function randomBelow(seed: number): (bound: number) => number {
  let state = (seed ^ 0x9e3779b9) >>> 0;
  return (bound) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * bound);
  };
}

type Json = Record<string, unknown>;

/** A random schema; deeper and with more keywords as `hardness` (0 to 5) grows. */
export function randomSchema(next: (bound: number) => number, hardness: number): Json {
  const defs: Json = {};
  const pick = <T>(items: readonly T[]): T => items[next(items.length)]!;
  const make = (depth: number): Json => {
    const scalar: (() => Json)[] = [
      () => ({ type: 'boolean' }),
      () => ({ type: 'integer', ...(next(2) ? { minimum: next(50) - 20, maximum: 40 + next(5000) } : {}) }),
      () => ({ type: 'string', ...(next(2) ? { minLength: next(4), maxLength: 4 + next(12) } : { maxLength: 20 }) }),
      () => ({ enum: ['red', 'green', 7, null, true, 'a "quoted" one', { k: [1] }].slice(next(3), 4 + next(4)) }),
      () => ({ type: 'null' }),
      () => ({ const: pick(['x', 12, false, 'Grüße']) }),
      () => ({ type: 'string', pattern: pick(['^[a-z]{2,5}$', '^\\d{3}-\\d{4}$', '^(foo|bar)+$', '^a\\.b\\\\"c?$', '^[^a]{1,3}$', '^\\w+@\\w+\\.(de|com)$', '^(?:[A-F0-9]{2}:){2}[A-F0-9]{2}$', '^x.y$|^zz$']) }), // prettier-ignore
      () => ({ type: 'string', format: pick(['date', 'date-time', 'uuid', 'ipv4', 'email', 'time', 'hostname', 'ipv6', 'uri', 'duration']) }), // prettier-ignore
      () => pick([{ type: 'number', minimum: -1.5, maximum: 2.25 }, { type: 'number', exclusiveMinimum: 0, maximum: 1 }, { type: 'number', exclusiveMinimum: -0.125, exclusiveMaximum: 0.125 }]), // prettier-ignore
      () => pick([{ type: 'integer', multipleOf: 5, minimum: 0, maximum: 500 }, { type: 'integer', multipleOf: 7 }, { type: 'number', multipleOf: 0.25, minimum: -3, maximum: 3 }]), // prettier-ignore
      () => ({ type: ['integer', 'null'], exclusiveMinimum: -3, exclusiveMaximum: 3 }),
    ];
    if (depth === 0) return scalar[next(Math.min(scalar.length, 3 + 2 * hardness))]!();
    const nested: (() => Json)[] = [
      () => object(depth),
      () => object(depth),
      () => ({ type: 'array', items: make(depth - 1), minItems: next(3), maxItems: 2 + next(4) }),
      () => ({ anyOf: [make(depth - 1), make(depth - 1)] }),
      () => ({ type: 'array', prefixItems: [make(depth - 1), make(0)], items: false, minItems: 2 }),
      () => ({ type: 'array', items: { enum: ['a', 'b', 'c', 4] }, uniqueItems: true, minItems: next(3) }),
      () => ({ oneOf: [{ type: 'object', properties: { kind: { const: 'p' }, p: make(0) }, required: ['kind', 'p'] }, { type: 'object', properties: { kind: { const: 'q' }, q: make(depth - 1) }, required: ['kind'] }, { type: 'null' }] }), // prettier-ignore
      () => ({ type: 'object', additionalProperties: make(depth - 1), maxProperties: 1 + next(3) }),
      () => ({ type: 'object', patternProperties: { '^[a-z]{1,6}$': make(depth - 1) }, additionalProperties: false, maxProperties: 3 }), // prettier-ignore
      () => ({ allOf: [{ type: 'object', properties: { a: make(0) }, required: ['a'] }, { properties: { b: make(depth - 1) }, required: ['b'] }] }), // prettier-ignore
      () => ref(depth),
    ];
    return nested[next(Math.min(nested.length, 2 + 2 * hardness))]!();
  };
  const object = (depth: number): Json => {
    const names = ['name', 'age', 'tags', 'größe', 'a b', 'q"uote', 'inner', 'z'].slice(next(3), 3 + next(6));
    const schema: Json = {
      type: 'object',
      properties: Object.fromEntries(names.map((name) => [name, make(next(depth))])),
      required: names.filter(() => next(3) > 0),
    };
    if (next(3) > 0) schema.additionalProperties = false;
    else if (hardness > 2 && next(2)) schema.additionalProperties = make(0);
    if (hardness > 3 && next(4) === 0) schema.maxProperties = Math.max((schema.required as string[]).length, 2);
    if (hardness > 3 && next(4) === 0) schema.minProperties = Math.min(names.length, 2);
    return schema;
  };
  const ref = (depth: number): Json => {
    const name = `def${next(3)}`;
    if (!(name in defs)) {
      defs[name] = {};
      defs[name] =
        next(2) === 0
          ? make(depth - 1)
          : { type: 'object', properties: { v: make(0), next: { anyOf: [{ type: 'null' }, { $ref: `#/$defs/${name}` }] } }, required: ['v'] }; // prettier-ignore
    }
    return { $ref: `#/$defs/${name}` };
  };
  const root = object(Math.min(3, 1 + Math.floor(hardness / 2)));
  return Object.keys(defs).length > 0 ? { ...root, $defs: defs } : root;
}

/** A random text of a grammar without control tokens; null where it would not end soon. */
export function sampleText({ rules }: Grammar, next: (bound: number) => number): string | null {
  let room = 4000;
  const write = (node: GrammarNode, depth: number): string => {
    if (--room < 0 || depth > 200) throw new RangeError('too long');
    switch (node.kind) {
      case 'text':
        return node.text;
      case 'class': {
        const [first, last] = node.ranges[next(node.ranges.length)]!;
        const width = next(3) > 0 ? Math.min(last - first + 1, 96) : last - first + 1;
        const point = first + next(width);
        return point >= 0xd800 && point <= 0xdfff ? 'x' : String.fromCodePoint(point);
      }
      case 'control':
        throw new Error('a control token is no text');
      case 'sequence':
        return node.items.map((item) => write(item, depth + 1)).join('');
      case 'choice':
        return write(node.items[next(node.items.length)]!, depth + 1);
      case 'repeat': {
        const most = node.max ?? node.min + 6;
        const count = node.min + next(Math.min(most - node.min, 6) + 1);
        const atEdge = next(8) === 0 && most < 50 ? most : count;
        return Array.from({ length: atEdge }, () => write(node.item, depth + 1)).join('');
      }
      case 'rule':
        return write(rules[node.index]!, depth + 1);
    }
  };
  try {
    return write(rules[0]!, 0);
  } catch (error) {
    if (error instanceof RangeError) return null;
    throw error;
  }
}
