import { choice, GrammarBuilder, type Grammar, type GrammarNode } from './grammar.js';
import { JsonRules } from './json.js';
import { integersBetween, multiplesOf, numbersBetween, toDecimal, type Decimal } from './numbers.js';
import { arrayNode } from './schema-array.js';
import { assertionsOf, canonical, isObject, SchemaError, typesOf, valuesOf, type Json, type Schema, type TypeName } from './schema-error.js'; // prettier-ignore
import { areDisjoint, mergeSchemas } from './schema-merge.js';
import { objectNode } from './schema-object.js';
import { stringNode } from './schema-string.js';

const MAX_DEPTH = 64;
const MAX_RULES = 20_000;
const MAX_LISTED = 1000;
const MAX_DIVISOR = 64;
/** counts beyond this are refused: nobody means them, and a model cannot keep them */
const MAX_COUNT = 100_000;
const COUNTS = ['minLength', 'maxLength', 'minItems', 'maxItems', 'minProperties', 'maxProperties'];
/** keywords that an enum's values would have to be checked against one by one */
const BESIDE_VALUES = new Set(['type', 'enum', 'const', 'nullable']);

/**
 * JSON schemas -> grammar nodes, such that whatever a node matches is valid for its schema. Not all that is valid is
 * matched: properties keep their order, spaces are few, numbers have few digits. What cannot be held to is refused
 * with a SchemaError, never ignored. The schema itself is known to be well formed.
 */
export class SchemaConverter {
  readonly json: JsonRules;
  readonly #root: Schema;
  readonly #builder: GrammarBuilder;
  readonly #made = new Map<string, GrammarNode>();
  #depth = 0;

  constructor(root: Schema, builder: GrammarBuilder) {
    this.#root = root;
    this.#builder = builder;
    this.json = new JsonRules(builder);
  }

  convert = (schema: Schema, pointer: string): GrammarNode => {
    if (schema === true) return this.json.value;
    if (schema === false) return choice();
    const key = canonical(schema);
    const known = this.#made.get(key);
    if (known) return known;
    const reference = this.#builder.declare();
    this.#made.set(key, reference);
    if (++this.#depth > MAX_DEPTH) throw new SchemaError(pointer, `it is nested deeper than ${MAX_DEPTH} levels`);
    if (this.#builder.numRules > MAX_RULES) throw new SchemaError(pointer, 'the schema is too large');
    this.#builder.define(reference, this.#nodeOf(this.#flatten(schema, pointer), pointer));
    this.#depth--;
    return reference;
  };

  /** Without $ref, allOf and oneOf: what they say is merged in, or becomes anyOf. */
  #flatten(schema: Schema, pointer: string, numMerges = 0): Schema {
    if (typeof schema === 'boolean') return schema;
    if (numMerges > MAX_DEPTH) throw new SchemaError(pointer, 'its references go round in a circle');
    const { $ref, allOf, oneOf, ...rest } = assertionsOf(schema, pointer);
    let flat: Schema = rest;
    const parts: [Schema, string][] = [];
    if ($ref !== undefined) parts.push([this.#resolve($ref as string, `${pointer}/$ref`), `${pointer}/$ref`]);
    for (const [index, part] of ((allOf as Schema[]) ?? []).entries()) parts.push([part, `${pointer}/allOf/${index}`]);
    if (oneOf !== undefined) parts.push([{ anyOf: this.#disjoint(oneOf as Schema[], `${pointer}/oneOf`) }, pointer]);
    for (const [part, at] of parts) flat = mergeSchemas(flat, this.#flatten(part, at, numMerges + 1), pointer);
    return flat;
  }

  #resolve(ref: string, pointer: string): Schema {
    if (ref !== '#' && !ref.startsWith('#/')) {
      throw new SchemaError(pointer, `only references within the schema, such as '#/$defs/name', are supported`);
    }
    let at: unknown = this.#root;
    for (const part of ref.split('/').slice(1)) {
      const key = decodeURIComponent(part).replaceAll('~1', '/').replaceAll('~0', '~');
      at = typeof at === 'object' && at !== null && Object.hasOwn(at, key) ? (at as Json)[key] : undefined;
    }
    if (typeof at === 'boolean' || isObject(at)) return at;
    throw new SchemaError(pointer, `there is no schema at '${ref.slice(0, 200)}'`);
  }

  /** oneOf of schemas that exclude each other is anyOf. */
  #disjoint(branches: Schema[], pointer: string): Schema[] {
    const flat = branches.map((branch, index) => this.#flatten(branch, `${pointer}/${index}`));
    for (const [index, branch] of flat.entries()) {
      for (const [before, other] of flat.slice(0, index).entries()) {
        if (areDisjoint(branch, other)) continue;
        const message = `one value could be valid for this and for alternative ${before}; give them different types or a property with different 'const', or use 'anyOf'`;
        throw new SchemaError(`${pointer}/${index}`, message);
      }
    }
    return branches;
  }

  #nodeOf(schema: Schema, pointer: string): GrammarNode {
    if (typeof schema === 'boolean') return this.convert(schema, pointer);
    const { anyOf, ...rest } = schema;
    if (anyOf !== undefined) {
      const hasMore = Object.keys(rest).length > 0;
      const branches = (anyOf as Schema[]).map((branch, index) =>
        this.convert(hasMore ? { allOf: [rest, branch] } : branch, `${pointer}/anyOf/${index}`),
      );
      return choice(...branches);
    }
    for (const key of COUNTS) {
      if (((schema[key] as number | undefined) ?? 0) > MAX_COUNT) {
        throw new SchemaError(`${pointer}/${key}`, `counts above ${MAX_COUNT} are not supported`);
      }
    }
    const values = valuesOf(schema);
    if (values !== null) {
      const beside = Object.keys(schema).find((key) => !BESIDE_VALUES.has(key));
      if (beside !== undefined) {
        throw new SchemaError(
          `${pointer}/${beside}`,
          `'${beside}' beside 'enum' or 'const' is not supported; remove it`,
        );
      }
      return choice(...values.map((value) => this.json.literal(value)));
    }
    const types = typesOf(schema);
    if (types === null) return schema.nullable === true ? this.json.value : this.convert(true, pointer);
    return choice(...types.map((type) => this.#typed(schema, type, pointer)));
  }

  #typed(schema: Json, type: TypeName, pointer: string): GrammarNode {
    switch (type) {
      case 'null':
        return choice('null');
      case 'boolean':
        return choice('true', 'false');
      case 'string':
        return stringNode(schema, this.json, pointer);
      case 'array':
        return arrayNode(schema, this.json, this.convert, pointer);
      case 'object':
        return objectNode(schema, this.json, this.convert, pointer);
      case 'integer':
      case 'number':
        return this.#number(schema, type === 'integer', pointer);
    }
  }

  #number(schema: Json, isInteger: boolean, pointer: string): GrammarNode {
    const [min, isMinExcluded] = tightest(schema, 'minimum', 'exclusiveMinimum', (a, b) => a > b);
    const [max, isMaxExcluded] = tightest(schema, 'maximum', 'exclusiveMaximum', (a, b) => a < b);
    const divisor = schema.multipleOf as number | undefined;
    if (divisor !== undefined)
      return this.#multiples(divisor, isInteger, { min, max, isMinExcluded, isMaxExcluded }, pointer);
    if (min === null && max === null) return isInteger ? this.json.integer : this.json.number;
    const bounds = { min: min === null ? null : toDecimal(min), max: max === null ? null : toDecimal(max) };
    const node = (isInteger ? integersBetween : numbersBetween)(bounds, isMinExcluded, isMaxExcluded);
    if (node) return node;
    const message = 'no number of at most 15 digits lies between its bounds, or they have too many decimals';
    throw new SchemaError(pointer, message);
  }

  #multiples(divisor: number, isInteger: boolean, limits: Limits, pointer: string): GrammarNode {
    const { min, max, isMinExcluded, isMaxExcluded } = limits;
    if (min !== null && max !== null && (max - min) / divisor <= MAX_LISTED) {
      const unit: Decimal = toDecimal(divisor);
      const values: string[] = [];
      for (let n = Math.floor(min / divisor); n <= Math.ceil(max / divisor); n++) {
        const value = Number(`${unit.digits * BigInt(n)}e-${unit.scale}`);
        const isIn = (isMinExcluded ? value > min : value >= min) && (isMaxExcluded ? value < max : value <= max);
        // The division of a validator may round; what it would refuse is left out.
        if (isIn && Number.isInteger(value / divisor) && (!isInteger || Number.isInteger(value))) {
          values.push(JSON.stringify(value));
        }
      }
      return choice(...new Set(values));
    }
    const isSigned = min === null;
    const isOpen = max === null && (min === null || (min === 0 && !isMinExcluded));
    if (isOpen && Number.isInteger(divisor) && divisor > 0 && divisor <= MAX_DIVISOR) {
      return multiplesOf(divisor, isSigned, this.#builder);
    }
    const message = `'multipleOf' is supported with 'minimum' and 'maximum' that leave at most ${MAX_LISTED} values, or for whole numbers up to ${MAX_DIVISOR} with no bound but a minimum of 0`;
    throw new SchemaError(`${pointer}/multipleOf`, message);
  }
}

interface Limits {
  min: number | null;
  max: number | null;
  isMinExcluded: boolean;
  isMaxExcluded: boolean;
}

/** The bound that counts of an inclusive and an exclusive one. */
function tightest(
  schema: Json,
  inclusive: string,
  exclusive: string,
  isTighter: (a: number, b: number) => boolean,
): [number | null, boolean] {
  const [a, b] = [schema[inclusive] as number | undefined, schema[exclusive] as number | undefined];
  if (b === undefined) return [a ?? null, false];
  return a === undefined || !isTighter(a, b) ? [b, true] : [a, false];
}

/** The grammar of all that a schema allows here. */
export function schemaGrammar(schema: Schema): Grammar {
  const builder = new GrammarBuilder();
  return builder.build(new SchemaConverter(schema, builder).convert(schema, ''));
}
