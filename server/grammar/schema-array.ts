import { choice, sequence, text, type GrammarNode } from './grammar.js';
import type { JsonRules } from './json.js';
import type { Convert } from './schema-object.js';
import { canonical, isObject, SchemaError, valuesOf, type Json, type Schema } from './schema-error.js';

/** Subsets of so many values are followed one by one. */
const MAX_UNIQUE_VALUES = 8;

/** An array: all prefix items (as far as maxItems allows), then others of one kind. */
export function arrayNode(schema: Json, json: JsonRules, convert: Convert, pointer: string): GrammarNode {
  const isOlder = Array.isArray(schema.items);
  const prefix = ((isOlder ? schema.items : schema.prefixItems) as Schema[] | undefined) ?? [];
  const rest = (isOlder ? schema.additionalItems : schema.items) as Schema | undefined;
  const min = (schema.minItems as number | undefined) ?? 0;
  const max = (schema.maxItems as number | undefined) ?? null;
  if (max !== null && max < min) return choice();
  if (schema.uniqueItems === true && !(max !== null && max <= 1)) {
    return uniqueNode(prefix, rest, min, max, json, `${pointer}/uniqueItems`);
  }
  const at = `${pointer}/${isOlder ? 'additionalItems' : 'items'}`;
  if (prefix.length === 0) {
    if (rest === false) return min === 0 ? sequence('[', json.space, ']') : choice();
    return json.elements(convert(rest ?? true, at), min, max);
  }
  const numPrefix = max === null ? prefix.length : Math.min(prefix.length, max);
  const items = prefix
    .slice(0, numPrefix)
    .map((item, index) => convert(item, `${pointer}/${isOlder ? 'items' : 'prefixItems'}/${index}`));
  const hasMore = min > numPrefix || (rest !== undefined && rest !== false && (max === null || max > numPrefix));
  if (hasMore && rest === false) return choice();
  const more = hasMore ? json.builder.rule(json.following(convert(rest ?? true, at))) : null;
  const parts = items.map((item, index) => (index === 0 ? sequence(json.space, item) : json.following(item)));
  if (more) {
    const most = max === null ? null : max - numPrefix;
    parts.push({ kind: 'repeat', item: more, min: Math.max(0, min - numPrefix), max: most });
  }
  return sequence('[', ...parts, parts.length > 0 ? json.space : '', ']');
}

/** Different values of a small enum: which are left is part of the rule. */
function uniqueNode(
  prefix: Schema[],
  rest: Schema | undefined,
  min: number,
  max: number | null,
  json: JsonRules,
  pointer: string,
): GrammarNode {
  const values = prefix.length === 0 && isObject(rest) ? valuesOf(rest) : null;
  const distinct = [...new Map(values?.map((value) => [canonical(value), value])).values()];
  if (values === null || distinct.length > MAX_UNIQUE_VALUES) {
    const message = `'uniqueItems' is supported for items of an enum with up to ${MAX_UNIQUE_VALUES} values`;
    throw new SchemaError(pointer, message);
  }
  const made = new Map<number, GrammarNode>();
  const after = (used: number): GrammarNode => {
    const known = made.get(used);
    if (known) return known;
    const reference = json.builder.declare();
    made.set(used, reference);
    const count = distinct.filter((_, index) => used & (1 << index)).length;
    const end = count < min ? [] : [used === 0 ? text('') : json.space];
    const more = distinct.flatMap((value, index) => {
      if (used & (1 << index) || (max !== null && count >= max)) return [];
      const item = sequence(json.literal(value), after(used | (1 << index)));
      return [used === 0 ? sequence(json.space, item) : json.following(item)];
    });
    json.builder.define(reference, choice(...end, ...more));
    return reference;
  };
  return sequence('[', after(0), ']');
}
