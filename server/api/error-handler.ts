import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify';
import { ApiError, type ErrorCode } from '../errors.js';
import { isMessagesClient, requestIdOf, toMessagesError } from './messages-error.js';

/** Fastify's and Node's own errors under the codes that clients know. */
const KNOWN: Readonly<Record<string, [ErrorCode, string]>> = {
  FST_ERR_CTP_EMPTY_JSON_BODY: ['invalid_json', 'The request body is empty; send a JSON object.'],
  FST_ERR_CTP_BODY_TOO_LARGE: ['request_too_large', 'The request body is too long; --max-body-size sets the limit.'],
  FST_ERR_CTP_INVALID_MEDIA_TYPE: ['unsupported_media_type', 'Send the body as content-type application/json.'],
  FST_ERR_CTP_INVALID_CONTENT_LENGTH: ['invalid_value', 'The body is not as long as its content-length header says.'],
  FST_ERR_BAD_URL: ['invalid_value', 'The path of the request is not a valid URL.'],
  FST_ERR_MAX_PARAM_LENGTH: ['not_found', 'The path of the request is too long.'],
};

const RETRY_LATER = new Set([429, 503]);

export function toApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error;
  const { code, statusCode, message } = error as Partial<FastifyError>;
  const known = code === undefined ? undefined : KNOWN[code];
  if (known) return new ApiError(known[0], known[1]);
  if (error instanceof SyntaxError)
    return new ApiError('invalid_json', `The request body is not valid JSON: ${error.message}.`);
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) {
    return new ApiError('invalid_value', message ?? 'The request is not valid.');
  }
  return new ApiError('internal_error', 'Something broke on the server; its log says what.');
}

export function sendError(error: unknown, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  const shown = toApiError(error);
  if (shown.code === 'internal_error') request.log.error(error, 'a request failed');
  else request.log.debug({ code: shown.code, param: shown.param }, shown.message);
  if (RETRY_LATER.has(shown.status)) reply.header('retry-after', '1');
  if (shown.status === 426) reply.header('upgrade', 'websocket');
  if (shown.status === 401) reply.header('www-authenticate', 'Bearer');
  const body = isMessagesClient(request) ? toMessagesError(shown, requestIdOf(reply)) : shown.toBody();
  return reply.code(shown.status).type('application/json; charset=utf-8').send(body);
}
