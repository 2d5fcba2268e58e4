import { Ajv } from 'ajv';
import { Ajv2020 } from 'ajv/dist/2020.js';
import type { Grammar } from './grammar.js';
import { productivePart } from './productive.js';
import { isObject, SchemaError, type Schema } from './schema-error.js';
import { schemaGrammar } from './schema.js';

const MAX_SCHEMA_BYTES = 256 * 1024;
const MAX_SCHEMA_DEPTH = 128;

/** A client's schema -> the grammar of what it allows. Throws SchemaError where it is wrong or cannot be held to. */
export class SchemaCompiler {
  readonly #current = new Ajv2020({ strict: false, logger: false, validateFormats: false });
  readonly #older = new Ajv({ strict: false, logger: false, validateFormats: false });

  compile(schema: unknown): Grammar {
    if (typeof schema !== 'boolean' && !isObject(schema)) throw new SchemaError('', 'a schema is an object');
    checkSize(schema);
    this.#checkForm(schema);
    const grammar = productivePart(schemaGrammar(schema));
    if (grammar === null) throw new SchemaError('', 'no value of finite length is valid for it');
    return grammar;
  }

  #checkForm(schema: Schema): void {
    const dialect = typeof schema === 'boolean' ? undefined : schema['$schema'];
    const known = typeof dialect === 'string' ? /draft-0[4-7]|2019-09|2020-12/.exec(dialect) : null;
    if (dialect !== undefined && known === null) {
      throw new SchemaError('/$schema', 'this dialect is not known; use draft 2020-12 or draft-07');
    }
    const isOlder = known?.[0].startsWith('draft') === true;
    const plain = typeof schema === 'boolean' ? schema : { ...schema };
    if (typeof plain !== 'boolean') delete plain['$schema'];
    const ajv = isOlder ? this.#older : this.#current;
    if (ajv.validateSchema(plain) === true) return;
    const [error] = ajv.errors ?? [];
    throw new SchemaError(error?.instancePath ?? '', `it is no valid schema here: ${error?.message ?? 'unknown'}`);
  }
}

/** Before anything walks the schema by recursion. */
function checkSize(schema: Schema): void {
  let open: unknown[] = [schema];
  for (let depth = 0; open.length > 0; depth++) {
    if (depth > MAX_SCHEMA_DEPTH) throw new SchemaError('', `it is nested deeper than ${MAX_SCHEMA_DEPTH} levels`);
    open = open.flatMap((value): unknown[] =>
      typeof value === 'object' && value !== null ? Object.values(value) : [],
    );
  }
  if (JSON.stringify(schema).length > MAX_SCHEMA_BYTES) {
    throw new SchemaError('', `it has more than ${MAX_SCHEMA_BYTES} characters`);
  }
}
