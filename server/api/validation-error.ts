import type { ErrorObject } from 'ajv';
import { ApiError } from '../errors.js';

/** '/messages/0/content' -> 'messages[0].content' */
export function paramOf(instancePath: string): string | null {
  const parts = instancePath.split('/').slice(1);
  const names = parts.map((part) => part.replaceAll('~1', '/').replaceAll('~0', '~'));
  return (
    names.reduce((param, name) => (/^\d+$/.test(name) && param ? `${param}[${name}]` : join(param, name)), '') || null
  );
}

/** The first of Ajv's complaints as the error that a client gets. Needs Ajv's option `verbose`. */
export function toApiError(errors: readonly ErrorObject[]): ApiError {
  const error = errors[0]!;
  const param = paramOf(error.instancePath);
  const name = param === null ? 'The request body' : `'${param}'`;
  const params = error.params as Record<string, unknown>;
  switch (error.keyword) {
    case 'required': {
      const missing = join(param ?? '', params['missingProperty'] as string);
      return new ApiError('missing_required_parameter', `'${missing}' is missing; it is required.`, missing);
    }
    case 'type':
      return new ApiError(
        'invalid_type',
        `${name} must be ${typesOf(error, errors)}; it is ${kindOf(error.data)}.`,
        param,
      );
    case 'discriminator': {
      const tagged = join(param ?? '', params['tag'] as string);
      const values = tagsOf(error);
      const value = params['tagValue'];
      if (value === undefined) {
        return new ApiError(
          'missing_required_parameter',
          `'${tagged}' is missing; it must be one of ${values}.`,
          tagged,
        );
      }
      const code = typeof value === 'string' ? 'invalid_value' : 'invalid_type';
      return new ApiError(code, `'${tagged}' must be one of ${values}; it is ${shown(value)}.`, tagged);
    }
    case 'enum':
      return invalid(`must be one of ${(params['allowedValues'] as unknown[]).map(shown).join(', ')}`);
    case 'additionalProperties': {
      const extra = join(param ?? '', params['additionalProperty'] as string);
      return new ApiError('unsupported_parameter', `'${extra}' is not supported here; remove it.`, extra);
    }
    case 'minimum':
    case 'maximum':
    case 'exclusiveMinimum':
    case 'exclusiveMaximum':
      return invalid(`must be ${params['comparison'] as string} ${params['limit'] as number}`);
    case 'minItems':
    case 'maxItems':
      return invalid(
        `must have ${bound(error.keyword)} ${params['limit'] as number} item(s)`,
        (error.data as unknown[]).length,
      );
    case 'minLength':
    case 'maxLength':
      return invalid(
        `must have ${bound(error.keyword)} ${params['limit'] as number} character(s)`,
        (error.data as string).length,
      );
    case 'maxProperties':
      return invalid(
        `must have at most ${params['limit'] as number} entries`,
        Object.keys(error.data as object).length,
      );
    default:
      return invalid(error.message ?? 'is not valid');
  }

  function invalid(must: string, has?: number): ApiError {
    const end = has === undefined ? `it is ${shown(error.data)}` : `it has ${has}`;
    return new ApiError('invalid_value', `${name} ${must}; ${end}.`, param);
  }
}

function join(param: string, name: string): string {
  return param ? `${param}.${name}` : name;
}

function bound(keyword: string): string {
  return keyword.startsWith('min') ? 'at least' : 'at most';
}

/** Optional fields take null too, which is no advice: it is left out where there is another type. */
function typesOf(error: ErrorObject, errors: readonly ErrorObject[]): string {
  const same = errors.filter((other) => other.keyword === 'type' && other.instancePath === error.instancePath);
  const types = same.flatMap((other) => (other.params as { type: string | string[] }).type);
  const named = types.filter((type) => type !== 'null');
  return (named.length ? named : types).map((type) => ARTICLES[type] ?? type).join(' or ');
}

const ARTICLES: Record<string, string> = {
  string: 'a string',
  number: 'a number',
  integer: 'an integer',
  boolean: 'a boolean',
  array: 'an array',
  object: 'an object',
  null: 'null',
};

function kindOf(value: unknown): string {
  if (value === null) return 'null';
  if (typeof value === 'number') {
    if (!Number.isFinite(value)) return 'too large a number';
    return Number.isInteger(value) ? 'an integer' : 'a number with a fraction';
  }
  return ARTICLES[Array.isArray(value) ? 'array' : typeof value] ?? typeof value;
}

function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/** values that pick a branch, read from the document beside the failed oneOf */
function tagsOf(error: ErrorObject): string {
  const schema = error.parentSchema as { oneOf?: { $ref?: string }[] } | undefined;
  const names = (schema?.oneOf ?? []).map((branch) => branch.$ref?.split('/').at(-1) ?? '');
  return names.flatMap((name) => BRANCH_TAGS[name] ?? []).join(', ');
}

/** schema name -> the values of the tag that it stands for; a test compares this with the document */
export const BRANCH_TAGS: Record<string, string[]> = {
  SystemMessage: ['system', 'developer'],
  UserMessage: ['user'],
  AssistantMessage: ['assistant'],
  ToolMessage: ['tool'],
  MessagesUserTurn: ['user'],
  MessagesAssistantTurn: ['assistant'],
  MessagesSystemTurn: ['system'],
  MessagesTextBlock: ['text'],
  MessagesToolResultBlock: ['tool_result'],
  MessagesThinkingBlock: ['thinking'],
  MessagesRedactedThinkingBlock: ['redacted_thinking'],
  MessagesToolUseBlock: ['tool_use'],
};
