import {
  assertionsOf,
  canonical,
  isObject,
  SchemaError,
  typeOfValue,
  typesOf,
  valuesOf,
  hasType,
  type Json,
  type Schema,
  type TypeName,
} from './schema-error.js';

const GREATER = new Set(['minimum', 'exclusiveMinimum', 'minLength', 'minItems', 'minProperties']);
const SMALLER = new Set(['maximum', 'exclusiveMaximum', 'maxLength', 'maxItems', 'maxProperties']);
const MAX_BRANCHES = 64;

/** One schema that asserts what both do; neither has a $ref or an allOf. Throws where one schema cannot say it. */
export function mergeSchemas(some: Schema, other: Schema, pointer: string): Schema {
  if (some === false || other === false) return false;
  if (some === true) return other;
  if (other === true) return some;
  const merged: Json = {};
  const valueLists = [valuesOf(some), valuesOf(other)];
  if (valueLists[0] !== null || valueLists[1] !== null) {
    const [first, second] = valueLists[0] ? [valueLists[0], valueLists[1]] : [valueLists[1]!, null];
    const names = second ? new Set(second.map(canonical)) : null;
    const otherTypes = other.type === undefined ? null : typesOf(other);
    const someTypes = some.type === undefined ? null : typesOf(some);
    merged.enum = first.filter(
      (value) =>
        (names === null || names.has(canonical(value))) &&
        (otherTypes === null || hasType(otherTypes, value)) &&
        (someTypes === null || hasType(someTypes, value)),
    );
  }
  const keys = new Set([...Object.keys(some), ...Object.keys(other)]);
  for (const key of ['enum', 'const', 'nullable', 'type', 'properties', 'additionalProperties', 'required']) {
    keys.delete(key);
  }
  const types = mergeTypes(some, other);
  if (types?.length === 0) return false;
  if (types) merged.type = types;
  for (const key of keys) {
    const [a, b] = [some[key], other[key]];
    if (a === undefined || b === undefined || canonical(a) === canonical(b)) merged[key] = a ?? b;
    else if (GREATER.has(key)) merged[key] = Math.max(a as number, b as number);
    else if (SMALLER.has(key)) merged[key] = Math.min(a as number, b as number);
    else if (key === 'uniqueItems') merged[key] = true;
    else if (key === 'items' && isSchema(a) && isSchema(b)) merged[key] = { allOf: [a, b] };
    else if (key === 'anyOf') merged[key] = product(a as Schema[], b as Schema[], pointer);
    else throw new SchemaError(pointer, `'${key}' is given twice and cannot be joined`);
  }
  mergeProperties(some, other, merged, pointer);
  return merged;
}

function isSchema(value: unknown): value is Schema {
  return typeof value === 'boolean' || isObject(value);
}

function product(some: Schema[], others: Schema[], pointer: string): Schema[] {
  if (some.length * others.length > MAX_BRANCHES) {
    throw new SchemaError(pointer, `alternatives multiply to more than ${MAX_BRANCHES}`);
  }
  return some.flatMap((a) => others.map((b) => ({ allOf: [a, b] })));
}

function mergeTypes(some: Json, other: Json): TypeName[] | null {
  if (some.type === undefined && other.type === undefined) return null;
  if (some.type === undefined) return typesOf(other);
  if (other.type === undefined) return typesOf(some);
  const [a, b] = [typesOf(some)!, typesOf(other)!];
  const isIn = (type: TypeName, types: TypeName[]) =>
    types.includes(type) || (type === 'integer' && types.includes('number'));
  return [...new Set([...a.filter((type) => isIn(type, b)), ...b.filter((type) => isIn(type, a))])];
}

/** A property is held to what each side says of it: by name, or as an additional one. */
function mergeProperties(some: Json, other: Json, merged: Json, pointer: string): void {
  const required = [...((some.required as string[]) ?? []), ...((other.required as string[]) ?? [])];
  if (required.length > 0) merged.required = [...new Set(required)];
  const sides = [some, other] as const;
  const hasAny = sides.some((side) => side.properties !== undefined || side.additionalProperties !== undefined);
  if (!hasAny) return;
  const isClosed = (side: Json) => side.additionalProperties !== undefined && side.additionalProperties !== true;
  if (sides.some((side) => side.patternProperties !== undefined && isClosed(side))) {
    throw new SchemaError(
      pointer,
      "'patternProperties' with 'additionalProperties' cannot be joined with another schema",
    );
  }
  const own = (side: Json, name: string): Schema => {
    const properties = (side.properties ?? {}) as Record<string, Schema>;
    if (Object.hasOwn(properties, name)) return properties[name]!;
    return (side.additionalProperties as Schema | undefined) ?? true;
  };
  const names = new Set(sides.flatMap((side) => Object.keys((side.properties as Json) ?? {})));
  const properties: Record<string, Schema> = {};
  for (const name of names) properties[name] = both(own(some, name), own(other, name));
  if (names.size > 0) merged.properties = properties;
  const additional = sides.map((side) => side.additionalProperties as Schema | undefined);
  if (additional[0] === undefined && additional[1] === undefined) return;
  merged.additionalProperties = both(additional[0] ?? true, additional[1] ?? true);
}

function both(a: Schema, b: Schema): Schema {
  if (a === false || b === false) return false;
  if (a === true) return b;
  if (b === true) return a;
  return canonical(a) === canonical(b) ? a : { allOf: [a, b] };
}

/** Whether no value can be valid for both; false also where that is hard to tell. */
export function areDisjoint(a: Schema, b: Schema): boolean {
  if (a === false || b === false) return true;
  if (a === true || b === true) return false;
  const [values, others] = [valuesOf(a), valuesOf(b)];
  if (values && others) {
    const names = new Set(others.map(canonical));
    return !values.some((value) => names.has(canonical(value)));
  }
  const [types, otherTypes] = [typesOfAll(a, values), typesOfAll(b, others)];
  if (types && otherTypes) {
    const expand = (list: TypeName[]) =>
      new Set(list.flatMap((type) => (type === 'number' ? ['number', 'integer'] : [type])));
    const wide = expand(otherTypes);
    if (![...expand(types)].some((type) => wide.has(type))) return true;
  }
  const isObjectOnly = (list: TypeName[] | null) => list?.length === 1 && list[0] === 'object';
  if (!isObjectOnly(types) || !isObjectOnly(otherTypes)) return false;
  return [
    [a, b],
    [b, a],
  ].some(([one, another]) =>
    ((one!.required as string[]) ?? []).some((name) => {
      const mine = propertyOf(one!, name);
      const theirs = propertyOf(another!, name);
      if (theirs === false) return true;
      const isRequiredThere = ((another!.required as string[]) ?? []).includes(name);
      return isRequiredThere && mine !== undefined && theirs !== undefined && arePlainlyDisjoint(mine, theirs);
    }),
  );
}

function arePlainlyDisjoint(a: Schema, b: Schema): boolean {
  if (!isObject(a) || !isObject(b) || a.$ref !== undefined || b.$ref !== undefined) return false;
  return areDisjoint(assertionsOf(a, ''), assertionsOf(b, ''));
}

function propertyOf(schema: Json, name: string): Schema | undefined {
  const properties = (schema.properties ?? {}) as Record<string, Schema>;
  if (Object.hasOwn(properties, name)) return properties[name];
  return schema.patternProperties === undefined && schema.additionalProperties === false ? false : undefined;
}

/** Only what a schema says outright: keywords without `type` leave other types valid. */
function typesOfAll(schema: Json, values: unknown[] | null): TypeName[] | null {
  if (values) return [...new Set(values.map(typeOfValue))];
  return schema.type === undefined ? null : typesOf(schema);
}
