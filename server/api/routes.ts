import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify';
import { ApiError } from '../errors.js';
import { ApiKeys } from './auth.js';
import type { ApiContext } from './context.js';
import type { Contract } from './contract.js';
import { allowOrigins } from './cors.js';
import { sendError } from './error-handler.js';
import { makeHandlers } from './handlers.js';
import { keepSeedSource } from './json-body.js';
import { isMessagesClient, requestIdOf } from './messages-error.js';
import { refuseUnsupportedInMessages } from './messages-unsupported.js';
import { checkOrigin, ResponseSockets } from './response-sockets.js';
import type { Socket } from './response-socket.js';
import { refuseUnsupportedInResponses } from './response-unsupported.js';
import { isObject, refuseUnsupported, type Json } from './unsupported.js';
import { toApiError } from './validation-error.js';

declare module 'fastify' {
  interface FastifyRequest {
    /** whose API key it came with; '' where none are configured */
    tenant: string;
  }
  interface FastifyContextConfig {
    isPublic?: boolean;
    operationId?: string;
  }
}

/** Registers every operation of the contract with its handler, validation, authentication and error bodies. */
export function registerRoutes(app: FastifyInstance, context: ApiContext): void {
  const { config, contract } = context;
  const keys = new ApiKeys(config.apiKeys);
  app.decorateRequest('tenant', '');
  allowOrigins(app, config.corsOrigins);
  app.addHook('onRequest', async (request, reply) => {
    reply.header('x-request-id', request.id);
    if (isMessagesClient(request)) requestIdOf(reply);
  });
  // Deny by default: unknown paths ask for the key too.
  app.addHook('onRequest', async (request) => {
    if (!request.routeOptions.config.isPublic) request.tenant = keys.tenantOf(request.headers);
  });
  app.addHook('onResponse', async (request, reply) => {
    context.metrics.observeResponse(request.routeOptions.config.operationId ?? 'none', reply.statusCode);
  });
  parseJson(app);
  app.setValidatorCompiler(({ schema }) => contract.validator((schema as { $ref: string }).$ref));
  app.setSchemaErrorFormatter((errors) => toApiError(errors));
  app.setErrorHandler((error, request, reply) => sendError(error, request, reply));
  app.setNotFoundHandler((request, reply) => refusePath(request, reply, context));

  const sockets = new ResponseSockets(context);
  sockets.register(app);
  const handlers = makeHandlers(context) as unknown as Record<string, RouteHandlerMethod>;
  for (const { operationId, method, url, bodyRef, isPublic } of contract.operations) {
    const handler = handlers[operationId];
    if (!handler) throw new Error(`operation ${operationId} has no handler`);
    const routeConfig = { isPublic, operationId };
    if (operationId === 'connectResponses') {
      // Only where the plugin is loaded does a route take WebSockets.
      app.after(() => {
        app.route({
          method,
          url,
          handler,
          config: routeConfig,
          preValidation: async (request) => {
            if (request.ws) checkOrigin(request, context);
          },
          wsHandler: (socket: Socket, request) => sockets.connect(socket, request),
        });
      });
      continue;
    }
    app.route({
      method,
      url,
      handler,
      config: routeConfig,
      ...(bodyRef === null
        ? {}
        : { schema: { body: { $ref: bodyRef } }, preValidation: fieldCheck(operationId, bodyRef, contract) }),
    });
    // Ids with slashes, as they are on the hub.
    if (url === '/v1/models/:model') app.get('/v1/models/*', { config: routeConfig }, handler);
  }
}

function parseJson(app: FastifyInstance): void {
  const parse = app.getDefaultJsonParser('error', 'error');
  app.removeAllContentTypeParsers();
  app.addContentTypeParser('application/json', { parseAs: 'string' }, (request, raw, done) => {
    void parse(request, raw as string, (error, body) => {
      if (error) return done(invalidJson(error), undefined);
      keepSeedSource(body, raw as string);
      done(null, body);
    });
  });
}

function invalidJson(error: Error): ApiError {
  const isEmpty = (error as Error & { code?: string }).code === 'FST_ERR_CTP_EMPTY_JSON_BODY';
  const reason = isEmpty
    ? 'is empty; send a JSON object'
    : `is not valid JSON: ${(error.cause as Error | undefined)?.message ?? error.message}`;
  return new ApiError('invalid_json', `The request body ${reason}.`);
}

/** operation -> what refuses known and unsupported fields of its body */
const REFUSALS: Readonly<Record<string, (body: Json, knownFields: ReadonlySet<string>) => void>> = {
  createChatCompletion: refuseUnsupported,
  createCompletion: (body, knownFields) => refuseUnsupported(body, knownFields, true),
  createMessage: refuseUnsupportedInMessages,
  countMessageTokens: refuseUnsupportedInMessages,
  createResponse: refuseUnsupportedInResponses,
  countResponseTokens: refuseUnsupportedInResponses,
};

/** What the schema cannot say: fields that change results elsewhere. Others are none of ours, and logged. */
function fieldCheck(operationId: string, bodyRef: string, contract: Contract) {
  const knownFields = new Set(contract.propertiesOf(bodyRef.split('/').at(-1)!));
  return async ({ body, log }: FastifyRequest): Promise<void> => {
    if (!isObject(body)) return;
    REFUSALS[operationId]?.(body, knownFields);
    const unknown = Object.keys(body).filter((name) => !knownFields.has(name));
    if (unknown.length)
      log.debug({ fields: unknown.map((name) => name.slice(0, 60)).slice(0, 20) }, 'fields without effect');
  };
}

/** 405 where the path exists with another method. */
function refusePath(request: FastifyRequest, reply: FastifyReply, { contract }: ApiContext): FastifyReply {
  const path = request.url.split('?')[0]!;
  const methods = contract.operations.filter((operation) => matches(operation.path, path)).map(({ method }) => method);
  if (methods.length === 0) {
    const error = new ApiError(
      'not_found',
      `There is no ${request.method} ${path.slice(0, 200)}; /openapi.json lists what there is.`,
    );
    return sendError(error, request, reply);
  }
  reply.header('allow', methods.join(', '));
  return sendError(
    new ApiError('method_not_allowed', `${path.slice(0, 200)} takes ${methods.join(', ')}, not ${request.method}.`),
    request,
    reply,
  );
}

function matches(pattern: string, path: string): boolean {
  return new RegExp(`^${pattern.replaceAll('.', '\\.').replace(/\{\w+\}/g, '.+')}$`).test(path);
}
