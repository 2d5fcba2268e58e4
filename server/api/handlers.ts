import type { FastifyReply, FastifyRequest } from 'fastify';
import { createChatCompletion } from './chat.js';
import type { ApiContext } from './context.js';
import { getHealth, getLiveness } from './health.js';
import { indexPage } from './index-page.js';
import { countMessageTokens, createMessage } from './messages.js';
import { listModels, retrieveModel } from './models.js';
import type { operations } from './openapi.js';
import { resumeChatCompletion } from './resumable.js';
import { replayCompletion } from './replay.js';
import { controlChatCompletion } from './running.js';
import { refusePlainRequest } from './response-sockets.js';
import {
  cancelResponse,
  countResponseTokens,
  createResponse,
  deleteResponse,
  getResponse,
  listInputItems,
} from './responses.js';
import { createCompletion } from './text-completion.js';
import { detokenize, tokenize } from './tokens.js';

/** What a handler finds in the request, by the contract. */
interface RouteOf<Operation> {
  Body: Operation extends { requestBody: { content: { 'application/json': infer Body } } } ? Body : unknown;
  Params: Operation extends { parameters: { path: infer Path extends object } } ? Path : unknown;
  Querystring: Operation extends { parameters: { query?: infer Query } } ? NonNullable<Query> : unknown;
}

/** One handler for each operationId, no more and no less. */
export type Handlers = {
  [Id in keyof operations]: (request: FastifyRequest<RouteOf<operations[Id]>>, reply: FastifyReply) => unknown;
};

export function makeHandlers(context: ApiContext) {
  return {
    createChatCompletion: (request, reply) => createChatCompletion(context, request, reply),
    resumeChatCompletion: (request, reply) => resumeChatCompletion(context, request, reply),
    controlChatCompletion: (request) => controlChatCompletion(context, request),
    replayCompletion: (request, reply) => replayCompletion(context, request, reply),
    createMessage: (request, reply) => createMessage(context, request, reply),
    countMessageTokens: (request) => countMessageTokens(context, request),
    connectResponses: () => refusePlainRequest(),
    createResponse: (request, reply) => createResponse(context, request, reply),
    countResponseTokens: (request) => countResponseTokens(context, request),
    getResponse: (request, reply) => getResponse(context, request, reply),
    deleteResponse: (request) => deleteResponse(context, request),
    cancelResponse: (request, reply) => cancelResponse(context, request, reply),
    listInputItems: (request) => listInputItems(context, request),
    createCompletion: (request, reply) => createCompletion(context, request, reply),
    tokenize: (request) => tokenize(context, request),
    detokenize: (request) => detokenize(context, request),
    listModels: (request) => listModels(context, request),
    retrieveModel: (request) => retrieveModel(context, request),
    getHealth: (request, reply) => getHealth(context, request, reply),
    getLiveness: (_request, reply) => getLiveness(context, reply),
    getMetrics: async (_request, reply) => {
      void reply.type(context.metrics.registry.contentType);
      return context.metrics.registry.metrics();
    },
    getOpenApi: () => context.contract.document,
    getIndex: (request, reply) => {
      void reply.type('text/html; charset=utf-8');
      return indexPage(context.modelNames[0]!, `${request.protocol}://${request.host}`);
    },
  } satisfies Handlers;
}
