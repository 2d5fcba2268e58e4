import { readFileSync } from 'node:fs';
import { Ajv2020, type ValidateFunction } from 'ajv/dist/2020.js';
import { parse } from 'yaml';

export interface Operation {
  operationId: string;
  method: 'GET' | 'POST' | 'DELETE';
  /** as in the document: /v1/models/{model} */
  path: string;
  /** as Fastify writes it: /v1/models/:model */
  url: string;
  /** $ref of the JSON request body, where there is one */
  bodyRef: string | null;
  /** works without an API key */
  isPublic: boolean;
}

interface OperationNode {
  operationId: string;
  security?: unknown[];
  requestBody?: { content: Record<string, { schema: { $ref: string } }> };
}

interface DocumentNode {
  paths: Record<string, Record<string, OperationNode>>;
  components: { schemas: Record<string, { properties?: Record<string, unknown> }> };
}

/** The one OpenAPI document: what is routed, what is validated and what /openapi.json answers. */
export class Contract {
  readonly document: Record<string, unknown>;
  readonly operations: readonly Operation[];
  readonly #ajv: Ajv2020;
  readonly #schemas: DocumentNode['components']['schemas'];

  constructor(yaml: string) {
    this.document = parse(yaml) as Record<string, unknown>;
    const { paths, components } = this.document as unknown as DocumentNode;
    this.#schemas = components.schemas;
    this.operations = Object.entries(paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, node]) => ({
        operationId: node.operationId,
        method: method.toUpperCase() as Operation['method'],
        path,
        url: path.replace(/\{(\w+)\}/g, ':$1'),
        bodyRef: node.requestBody?.content['application/json']?.schema.$ref ?? null,
        isPublic: node.security?.length === 0,
      })),
    );
    this.#ajv = new Ajv2020({
      strict: true,
      allowUnionTypes: true,
      strictRequired: false,
      discriminator: true,
      coerceTypes: false,
      removeAdditional: false,
      useDefaults: false,
      verbose: true,
    });
    this.#ajv.addVocabulary(['components']);
    this.#ajv.addSchema({ $id: 'contract', components: withDiscriminators(components) }, undefined, false, false);
  }

  static read(): Contract {
    return new Contract(readFileSync(new URL('../../openapi/openapi.yaml', import.meta.url), 'utf8'));
  }

  /** Validator of '#/components/schemas/Name'. */
  validator(ref: string): ValidateFunction {
    return this.#ajv.compile({ $ref: `contract${ref}` });
  }

  /** names of a schema's properties: what a client may send without it being news */
  propertiesOf(schemaName: string): readonly string[] {
    return Object.keys(this.#schemas[schemaName]?.properties ?? {});
  }
}

/**
 * `x-tag: role` beside oneOf names the property that picks the branch. Ajv calls that a discriminator; the document
 * does not, because the type generator would take the branches' schema names for its values.
 */
function withDiscriminators(node: unknown): unknown {
  if (Array.isArray(node)) return node.map(withDiscriminators);
  if (typeof node !== 'object' || node === null) return node;
  const { 'x-tag': tag, ...rest } = node as Record<string, unknown>;
  const entries = Object.entries(rest).map(([key, value]) => [key, withDiscriminators(value)] as const);
  return { ...Object.fromEntries(entries), ...(tag === undefined ? {} : { discriminator: { propertyName: tag } }) };
}
