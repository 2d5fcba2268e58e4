export type Json = Record<string, unknown>;
export type Schema = boolean | Json;

/** A schema that output cannot be held to; the pointer says which part of it. */
export class SchemaError extends Error {
  readonly pointer: string;

  constructor(pointer: string, message: string) {
    super(message);
    this.pointer = pointer;
  }
}

export function isObject(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** The same text for equal JSON values, whatever the order of their keys. */
export function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (!isObject(value)) return JSON.stringify(value);
  const keys = Object.keys(value).sort();
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join()}}`;
}

export function escapePointer(key: string): string {
  return key.replaceAll('~', '~0').replaceAll('/', '~1');
}

/** Keywords that say nothing about what is valid. */
const ANNOTATIONS = new Set([
  '$comment', '$defs', '$id', '$schema', 'contentEncoding', 'contentMediaType', 'default', 'definitions', 'deprecated',
  'description', 'discriminator', 'example', 'examples', 'externalDocs', 'readOnly', 'title', 'writeOnly',
]); // prettier-ignore

/** Keywords that are followed exactly. */
const FOLLOWED = new Set([
  '$ref', 'additionalItems', 'additionalProperties', 'allOf', 'anyOf', 'const', 'enum', 'exclusiveMaximum',
  'exclusiveMinimum', 'format', 'items', 'maxItems', 'maxLength', 'maxProperties', 'maximum', 'minItems', 'minLength',
  'minProperties', 'minimum', 'multipleOf', 'nullable', 'oneOf', 'pattern', 'patternProperties', 'prefixItems',
  'properties', 'propertyNames', 'required', 'type', 'uniqueItems',
]); // prettier-ignore

/** What a schema asserts, without annotations. Throws for a keyword that would have to be ignored. */
export function assertionsOf(schema: Json, pointer: string): Json {
  const assertions: Json = {};
  for (const [key, value] of Object.entries(schema)) {
    if (ANNOTATIONS.has(key) || key.startsWith('x-')) continue;
    if (!FOLLOWED.has(key)) {
      throw new SchemaError(`${pointer}/${escapePointer(key)}`, `the keyword '${key.slice(0, 60)}' is not supported`);
    }
    if (key === 'nullable' ? value === false : key === 'uniqueItems' && value === false) continue;
    assertions[key] = value;
  }
  return assertions;
}

export const TYPES = ['object', 'array', 'string', 'number', 'integer', 'boolean', 'null'] as const;
export type TypeName = (typeof TYPES)[number];

const TYPE_OF_KEYWORD: Record<string, TypeName> = {
  additionalItems: 'array', additionalProperties: 'object', exclusiveMaximum: 'number', exclusiveMinimum: 'number',
  format: 'string', items: 'array', maxItems: 'array', maxLength: 'string', maxProperties: 'object',
  maximum: 'number', minItems: 'array', minLength: 'string', minProperties: 'object', minimum: 'number',
  multipleOf: 'number', pattern: 'string', patternProperties: 'object', prefixItems: 'array', properties: 'object',
  propertyNames: 'object', required: 'object', uniqueItems: 'array',
}; // prettier-ignore

/** Types of a schema; without `type` those that its keywords speak of, null where they speak of none. */
export function typesOf(schema: Json): TypeName[] | null {
  const { type } = schema;
  if (type !== undefined) {
    const types = (Array.isArray(type) ? type : [type]) as TypeName[];
    return schema.nullable === true && !types.includes('null') ? [...types, 'null'] : types;
  }
  const spoken = new Set(Object.keys(schema).flatMap((key) => TYPE_OF_KEYWORD[key] ?? []));
  return spoken.size === 0 ? null : [...spoken];
}

export function typeOfValue(value: unknown): TypeName {
  if (value === null) return 'null';
  if (Array.isArray(value)) return 'array';
  if (typeof value === 'number') return Number.isInteger(value) ? 'integer' : 'number';
  return typeof value as TypeName;
}

export function hasType(types: readonly TypeName[], value: unknown): boolean {
  const type = typeOfValue(value);
  return types.includes(type) || (type === 'integer' && types.includes('number'));
}

/** `enum` and `const` as one list; null where a schema has neither. */
export function valuesOf(schema: Json): unknown[] | null {
  const hasConst = Object.hasOwn(schema, 'const');
  if (!hasConst && !Array.isArray(schema.enum)) return null;
  const values = (schema.enum as unknown[] | undefined) ?? [schema.const];
  const types = schema.type === undefined ? null : typesOf(schema);
  return values.filter(
    (value) => (!hasConst || canonical(value) === canonical(schema.const)) && (types === null || hasType(types, value)),
  );
}
