import { randomUUID } from 'node:crypto';
import { ApiError } from '../errors.js';
import type { components } from './openapi.js';
import { isObject, type Json } from './unsupported.js';

type Schemas = components['schemas'];
export type OutputItem = Schemas['ResponseOutputItem'];

/** What a client puts into a conversation, in one form whichever way it was written. */
export type InputItem =
  | {
      type: 'message';
      id: string;
      role: 'user' | 'system' | 'developer';
      status: 'completed';
      content: { type: 'input_text'; text: string }[];
    }
  | { type: 'function_call_output'; id: string; call_id: string; output: string; status: 'completed' };

/** One step of a conversation. */
export type Item = InputItem | OutputItem;

/** Names of items: a prefix for each kind, as clients know them. */
export function newId(prefix: 'resp' | 'msg' | 'rs' | 'fc' | 'fco' | 'call'): string {
  return `${prefix}_${randomUUID().replaceAll('-', '')}`;
}

/** Marks reasoning that was sent as `encrypted_content`: its text, so that a client can give it back. */
const ENCODED = 'rodin1.';

export function encodeReasoning(text: string): string {
  return ENCODED + Buffer.from(text).toString('base64');
}

/** A request's input -> items; `find` knows the items that it may refer to. Throws ApiError with the place. */
export function readItems(input: unknown, find: (id: string) => Item | undefined): Item[] {
  if (typeof input === 'string') return [userMessage(input)];
  if (!Array.isArray(input)) return [];
  return input.map((item: unknown, index) => readItem(item, `input[${index}]`, find));
}

function userMessage(text: string): Item {
  return {
    type: 'message',
    id: newId('msg'),
    role: 'user',
    status: 'completed',
    content: [{ type: 'input_text', text }],
  };
}

function readItem(item: unknown, param: string, find: (id: string) => Item | undefined): Item {
  if (!isObject(item)) throw new ApiError('invalid_type', `'${param}' must be an object.`, param);
  const type: unknown = item['type'] ?? ('role' in item ? 'message' : 'item_reference');
  switch (type) {
    case 'message':
      return readMessage(item, param);
    case 'reasoning':
      return readReasoning(item, param);
    case 'function_call':
      return {
        type: 'function_call',
        id: idOf(item, 'fc'),
        call_id: textOf(item, 'call_id', param),
        name: textOf(item, 'name', param),
        arguments: textOf(item, 'arguments', param),
        status: 'completed',
      };
    case 'function_call_output': {
      const output = item['output'];
      return {
        type: 'function_call_output',
        id: idOf(item, 'fco'),
        call_id: textOf(item, 'call_id', param),
        output: typeof output === 'string' ? output : partsOf(output, ['input_text'], `${param}.output`).join('\n'),
        status: 'completed',
      };
    }
    case 'item_reference': {
      const id = textOf(item, 'id', param);
      const found = find(id);
      if (found) return found;
      const message = `'${param}.id' names no item of the previous response: '${id.slice(0, 100)}'.`;
      throw new ApiError('invalid_value', message, `${param}.id`);
    }
    default: {
      const known = 'message, reasoning, function_call, function_call_output, item_reference';
      const shown = typeof type === 'string' ? `, not ${type.slice(0, 60)}` : '';
      throw new ApiError('unsupported_value', `'${param}.type' must be one of ${known}${shown}.`, `${param}.type`);
    }
  }
}

function readMessage(item: Json, param: string): Item {
  const { role, content } = item;
  const isOutput = role === 'assistant';
  if (!isOutput && role !== 'user' && role !== 'system' && role !== 'developer') {
    const message = `'${param}.role' must be one of user, assistant, system, developer.`;
    throw new ApiError('invalid_value', message, `${param}.role`);
  }
  const types = isOutput ? ['output_text', 'input_text'] : ['input_text'];
  const texts = typeof content === 'string' ? [content] : partsOf(content, types, `${param}.content`);
  const shared = { type: 'message', id: idOf(item, 'msg'), status: 'completed' } as const;
  if (!isOutput) return { ...shared, role, content: texts.map((text) => ({ type: 'input_text', text })) };
  const parts = texts.map((text) => ({ type: 'output_text' as const, text, annotations: [], logprobs: [] }));
  return { ...shared, role, content: parts };
}

/** Its own text; where a client has dropped that, what it kept beside it. */
function readReasoning(item: Json, param: string): Item {
  const { content, encrypted_content: encoded, summary } = item;
  let texts = content ? partsOf(content, ['reasoning_text'], `${param}.content`) : [];
  if (texts.length === 0 && typeof encoded === 'string' && encoded !== '') {
    if (!encoded.startsWith(ENCODED)) {
      const message = `'${param}.encrypted_content' was not made here; leave the item out.`;
      throw new ApiError('invalid_value', message, `${param}.encrypted_content`);
    }
    texts = [Buffer.from(encoded.slice(ENCODED.length), 'base64').toString()];
  }
  if (texts.length === 0 && summary) texts = partsOf(summary, ['summary_text'], `${param}.summary`);
  return {
    type: 'reasoning',
    id: idOf(item, 'rs'),
    summary: [],
    content: texts.map((text) => ({ type: 'reasoning_text', text })),
    status: 'completed',
  };
}

function idOf({ id }: Json, prefix: Parameters<typeof newId>[0]): string {
  return typeof id === 'string' && id !== '' ? id : newId(prefix);
}

function textOf(item: Json, name: string, param: string): string {
  const value = item[name];
  if (typeof value === 'string') return value;
  const code = value === undefined || value === null ? 'missing_required_parameter' : 'invalid_type';
  throw new ApiError(code, `'${param}.${name}' must be a text.`, `${param}.${name}`);
}

function partsOf(parts: unknown, types: readonly string[], param: string): string[] {
  if (!Array.isArray(parts)) {
    throw new ApiError('invalid_type', `'${param}' must be a text or a list of parts.`, param);
  }
  return parts.map((part: unknown, index) => {
    const where = `${param}[${index}]`;
    const type = isObject(part) ? part['type'] : undefined;
    if (isObject(part) && types.includes(type as string) && typeof part['text'] === 'string') return part['text'];
    const message = `'${where}' must be a part of the type ${types.join(' or ')} with a text: the model reads text only.`;
    throw new ApiError('unsupported_value', message, where);
  });
}
