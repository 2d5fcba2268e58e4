import type { FastifyRequest } from 'fastify';
import { checkModel } from './chat-request.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

export function listModels(context: ApiContext): components['schemas']['ModelList'] {
  return { object: 'list', data: context.modelNames.map((name) => modelObject(name, context)) };
}

export function retrieveModel(
  context: ApiContext,
  request: FastifyRequest<{ Params: { model?: string; '*'?: string } }>,
): components['schemas']['Model'] {
  const name = request.params.model ?? request.params['*'] ?? '';
  checkModel(name, context);
  return modelObject(name, context);
}

function modelObject(id: string, { startedAt, maxModelLen }: ApiContext): components['schemas']['Model'] {
  return { id, object: 'model', created: startedAt, owned_by: 'rodin', max_model_len: maxModelLen };
}
