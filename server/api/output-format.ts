import { createHash } from 'node:crypto';
import type { RequestGrammar } from '../engine/request.js';
import { ApiError } from '../errors.js';
import { parseEbnf } from '../grammar/ebnf.js';
import { choice, GrammarBuilder, text, type Grammar } from '../grammar/grammar.js';
import { JsonRules } from '../grammar/json.js';
import { wholeRegex } from '../grammar/regex.js';
import { SchemaCompiler } from '../grammar/schema-check.js';
import { SchemaError } from '../grammar/schema-error.js';
import type { ChatBody } from './chat-request.js';

/** The format that a client asks for, under the name that it used. */
export interface OutputFormat {
  param: string;
  grammar: Grammar;
}

type Kind = 'json' | 'json_object' | 'regex' | 'choice' | 'grammar';
type Json = Record<string, unknown>;

/** Other servers' fields for the same. */
const OLDER_FIELDS: Readonly<Record<string, Kind>> = {
  guided_json: 'json',
  guided_regex: 'regex',
  guided_choice: 'choice',
  guided_grammar: 'grammar',
  json_schema: 'json',
  regex: 'regex',
  ebnf: 'grammar',
  grammar: 'grammar',
};

const MAX_CHOICES = 1024;
const MAX_TEXT = 64 * 1024;

/** Formats of requests -> grammars. */
export class OutputFormats {
  readonly #schemas = new SchemaCompiler();

  /** null: the answer is free. Throws ApiError where the format is wrong, or cannot be held to. */
  read(body: ChatBody): OutputFormat | null {
    const asked = askedFormats(body);
    if (asked.length > 1) {
      const [first, second] = asked.map(({ param }) => param);
      throw new ApiError('invalid_value', `'${first}' and '${second}' both say a format; give one of them.`, second);
    }
    const [only] = asked;
    return only === undefined ? null : { param: only.param, grammar: this.#grammarOf(only) };
  }

  /** The grammar of a schema; throws ApiError that names the place. */
  schema(schema: unknown, param: string): Grammar {
    try {
      return this.#schemas.compile(schema);
    } catch (error) {
      if (!(error instanceof SchemaError)) throw error;
      const where = error.pointer === '' ? 'at its top' : `at '${error.pointer.slice(0, 400)}'`;
      throw new ApiError('invalid_value', `The schema '${param}' cannot be used: ${where}, ${error.message}.`, param);
    }
  }

  #grammarOf({ kind, value, param }: Asked): Grammar {
    const fail = (problem: string): never => {
      throw new ApiError('invalid_value', `'${param}' ${problem}.`, param);
    };
    switch (kind) {
      case 'json':
        return this.schema(typeof value === 'string' ? parseJson(value, param) : value, param);
      case 'json_object': {
        const builder = new GrammarBuilder();
        return builder.build(new JsonRules(builder).object);
      }
      case 'choice': {
        const isList = Array.isArray(value) && value.length > 0 && value.length <= MAX_CHOICES;
        if (
          !isList ||
          !value.every(
            (item) =>
              typeof item === 'string' && item !== '' && item.length <= MAX_TEXT && !/\p{Surrogate}/u.test(item),
          )
        ) {
          return fail(`must be a list of 1 to ${MAX_CHOICES} texts, none of them empty`);
        }
        return new GrammarBuilder().build(choice(...value.map((item: string) => text(item))));
      }
      case 'regex':
      case 'grammar': {
        if (typeof value !== 'string' || value === '' || value.length > MAX_TEXT) {
          return fail(`must be a text of 1 to ${MAX_TEXT} characters`);
        }
        try {
          return kind === 'grammar' ? parseEbnf(value) : new GrammarBuilder().build(wholeRegex(value));
        } catch (error) {
          if (!(error instanceof SyntaxError)) throw error;
          return fail(`cannot be used: ${error.message}`);
        }
      }
    }
  }
}

interface Asked {
  kind: Kind;
  value: unknown;
  param: string;
}

function askedFormats(body: Json): Asked[] {
  const asked: Asked[] = [];
  const format = body['response_format'] as Json | null | undefined;
  if (format?.['type'] === 'json_object') {
    asked.push({ kind: 'json_object', value: true, param: 'response_format' });
  } else if (format?.['type'] === 'json_schema') {
    const param = 'response_format.json_schema.schema';
    const value = (format['json_schema'] as Json | undefined)?.['schema'] ?? format['schema'];
    if (value === undefined || value === null) {
      throw new ApiError(
        'missing_required_parameter',
        `'${param}' is missing; give the JSON schema of the answer.`,
        param,
      );
    }
    asked.push({ kind: 'json', value, param });
  }
  for (const [kind, value] of Object.entries((body['structured_outputs'] ?? {}) as Json)) {
    if (value === null || value === undefined || value === false) continue;
    asked.push({ kind: kind as Kind, value, param: `structured_outputs.${kind}` });
  }
  for (const [param, kind] of Object.entries(OLDER_FIELDS)) {
    if (body[param] !== undefined && body[param] !== null) asked.push({ kind, value: body[param], param });
  }
  return asked;
}

function parseJson(source: string, param: string): unknown {
  try {
    return JSON.parse(source);
  } catch (error) {
    throw new ApiError('invalid_value', `'${param}' is no JSON: ${(error as Error).message}.`, param);
  }
}

/** What the engine is given. */
export function toRequestGrammar(grammar: Grammar, endIds: readonly number[]): RequestGrammar {
  const key = createHash('sha256').update(JSON.stringify(grammar.rules)).digest('hex');
  return { key, rules: grammar.rules, endIds: [...endIds] };
}
