import { choice, repeat, sequence, text, type GrammarNode } from './grammar.js';
import type { JsonRules } from './json.js';
import { keyExcept, keyNode, patternBody } from './schema-string.js';
import { escapePointer, isObject, SchemaError, type Json, type Schema } from './schema-error.js';

/** What an object schema needs of its converter. */
export interface Convert {
  (schema: Schema, pointer: string): GrammarNode;
}

interface Member {
  node: GrammarNode;
  isRequired: boolean;
}

/**
 * An object: declared properties in the order of the schema, then others. Where `additionalProperties` is not given
 * and properties are declared, there are no others.
 */
export function objectNode(schema: Json, json: JsonRules, convert: Convert, pointer: string): GrammarNode {
  const properties: Record<string, Schema> = { ...((schema.properties as Record<string, Schema>) ?? {}) };
  const required = new Set((schema.required as string[]) ?? []);
  const additional = schema.additionalProperties as Schema | undefined;
  for (const name of required) {
    if (!Object.hasOwn(properties, name)) properties[name] = patternSchema(schema, additional ?? true, pointer);
  }
  const names = Object.keys(properties);
  if (names.includes('__proto__')) {
    throw new SchemaError(`${pointer}/properties/__proto__`, 'a property of this name is not supported; rename it');
  }
  const members = names.map((name): Member => {
    const at = `${pointer}/properties/${escapePointer(name)}`;
    const value = convert(properties[name]!, at);
    return {
      node: json.builder.rule(sequence(json.literal(name), ':', json.space, value)),
      isRequired: required.has(name),
    };
  });
  const min = (schema.minProperties as number | undefined) ?? 0;
  const max = (schema.maxProperties as number | undefined) ?? null;
  if (max !== null && max < required.size) return choice();
  const other = otherMember(schema, names, json, convert, pointer);
  if (members.length === 0) {
    if (other === null) return min === 0 ? sequence('{', json.space, '}') : choice();
    if (min > 1) {
      const message = "more than one property of unknown name cannot be held apart; name them in 'properties'";
      throw new SchemaError(`${pointer}/minProperties`, message);
    }
    return json.members(other, min, max);
  }
  const isCounted = min > required.size || (max !== null && max < members.length);
  const hasOther = other !== null && max === null && !isCounted;
  return sequence('{', chain(members, hasOther ? other : null, isCounted ? { min, max } : null, json), '}');
}

/** Members one behind the other, with commas between those that are there. */
function chain(
  members: readonly Member[],
  other: GrammarNode | null,
  limits: { min: number; max: number | null } | null,
  json: JsonRules,
): GrammarNode {
  const made = new Map<string, GrammarNode>();
  const from = (index: number, count: number): GrammarNode => {
    const key = `${index}:${limits ? count : Math.min(count, 1)}`;
    const known = made.get(key);
    if (known) return known;
    const node = json.builder.rule(rest(index, count));
    made.set(key, node);
    return node;
  };
  const rest = (index: number, count: number): GrammarNode => {
    const lead = (node: GrammarNode) => (count === 0 ? sequence(json.space, node) : json.following(node));
    const member = members[index];
    if (member === undefined) {
      if (limits && (count < limits.min || (limits.max !== null && count > limits.max))) return choice();
      const end = count === 0 ? text('') : json.space;
      if (other === null) return end;
      const more = repeat(json.following(other), 0, null);
      return choice(end, sequence(lead(other), more, json.space));
    }
    const taken = sequence(lead(member.node), from(index + 1, count + 1));
    return member.isRequired ? taken : choice(taken, from(index + 1, count));
  };
  return from(0, 0);
}

/** A member whose name is not declared; null where there are none. */
function otherMember(
  schema: Json,
  names: string[],
  json: JsonRules,
  convert: Convert,
  pointer: string,
): GrammarNode | null {
  const patterns = Object.entries((schema.patternProperties as Record<string, Schema> | undefined) ?? {});
  const additional = schema.additionalProperties as Schema | undefined;
  const { propertyNames } = schema as { propertyNames?: Schema };
  const member = (key: GrammarNode, value: GrammarNode) => json.builder.rule(sequence(key, ':', json.space, value));
  if (patterns.length > 0) {
    const at = `${pointer}/patternProperties`;
    if (patterns.length > 1 || names.length > 0 || propertyNames !== undefined) {
      const message = "'patternProperties' is supported with one pattern, and without 'properties' and 'propertyNames'";
      throw new SchemaError(at, message);
    }
    const [pattern, value] = patterns[0]!;
    const where = `${at}/${escapePointer(pattern)}`;
    return member(keyNode(patternBody(pattern, where)), convert(value, where));
  }
  if (additional === false || (additional === undefined && names.length > 0)) return null;
  const value = convert(additional ?? true, `${pointer}/additionalProperties`);
  if (propertyNames === undefined || propertyNames === true) return member(keyExcept([...names, '__proto__']), value);
  if (propertyNames === false) return null;
  if (names.length > 0) {
    throw new SchemaError(`${pointer}/propertyNames`, "'propertyNames' beside 'properties' is not supported");
  }
  return member(convert({ ...propertyNames, type: 'string' }, `${pointer}/propertyNames`), value);
}

/** What a required property is held to that is not declared. */
function patternSchema(schema: Json, additional: Schema, pointer: string): Schema {
  if (isObject(schema.patternProperties)) {
    throw new SchemaError(
      `${pointer}/required`,
      "a required property must be declared where 'patternProperties' is used",
    );
  }
  return additional;
}
