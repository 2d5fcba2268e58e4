import type { FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { checkModel } from './chat-request.js';
import type { ApiContext } from './context.js';
import { isMessagesClient } from './messages-error.js';
import type { components } from './openapi.js';

type Schemas = components['schemas'];

interface PageQuery {
  limit?: string;
  after_id?: string;
  before_id?: string;
}

const PAGE_SIZE = 20;
const MAX_PAGE_SIZE = 1000;

/** Clients of the Messages API, who name its version in a header, get its form. */
export function listModels(
  context: ApiContext,
  request: FastifyRequest<{ Querystring: PageQuery }>,
): Schemas['ModelList'] | Schemas['ModelPage'] {
  const { modelNames } = context;
  if (isMessagesClient(request)) return modelPage(request.query, context);
  return { object: 'list', data: modelNames.map((name) => modelObject(name, context)) };
}

export function retrieveModel(
  context: ApiContext,
  request: FastifyRequest<{ Params: { model?: string; '*'?: string } }>,
): Schemas['Model'] | Schemas['ModelInfo'] {
  const name = request.params.model ?? request.params['*'] ?? '';
  checkModel(name, context);
  return isMessagesClient(request) ? modelInfo(name, context) : modelObject(name, context);
}

function modelObject(id: string, { startedAt, maxModelLen }: ApiContext): Schemas['Model'] {
  return { id, object: 'model', created: startedAt, owned_by: 'rodin', max_model_len: maxModelLen };
}

function modelInfo(id: string, { startedAt, maxModelLen }: ApiContext): Schemas['ModelInfo'] {
  return {
    type: 'model',
    id,
    display_name: id,
    created_at: new Date(1000 * startedAt).toISOString(),
    max_input_tokens: maxModelLen - 1,
    max_tokens: maxModelLen - 1,
    capabilities: null,
    lifecycle: 'active',
    line: null,
    deprecated_at: null,
    retires_at: null,
  };
}

function modelPage(query: PageQuery, context: ApiContext): Schemas['ModelPage'] {
  const { modelNames } = context;
  const { limit: wanted, after_id: after, before_id: before } = query;
  const limit = wanted === undefined ? PAGE_SIZE : Number(wanted);
  if (!Number.isInteger(limit) || limit < 1 || limit > MAX_PAGE_SIZE) {
    throw new ApiError('invalid_value', `'limit' must be a whole number from 1 to ${MAX_PAGE_SIZE}.`, 'limit');
  }
  if (after !== undefined && before !== undefined) {
    throw new ApiError('invalid_value', "Give either 'after_id' or 'before_id'.", 'before_id');
  }
  for (const id of [after, before]) if (id !== undefined) checkModel(id, context);
  const rest =
    before === undefined
      ? modelNames.slice(after === undefined ? 0 : modelNames.indexOf(after) + 1)
      : modelNames.slice(0, modelNames.indexOf(before));
  const names = before === undefined ? rest.slice(0, limit) : rest.slice(-limit);
  return {
    data: names.map((name) => modelInfo(name, context)),
    has_more: rest.length > names.length,
    first_id: names[0] ?? null,
    last_id: names.at(-1) ?? null,
  };
}
