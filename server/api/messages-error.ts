import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ApiError } from '../errors.js';
import type { components } from './openapi.js';

export type MessagesError = components['schemas']['MessagesError'];

/** HTTP status -> the Messages API's type; other 4xx are invalid requests, other 5xx the server's. */
const TYPES: Readonly<Record<number, MessagesError['error']['type']>> = {
  401: 'authentication_error',
  404: 'not_found_error',
  413: 'request_too_large',
  429: 'rate_limit_error',
  503: 'overloaded_error',
};

/** Whether a client of the Messages API asks, who expects its errors whatever goes wrong. */
export function isMessagesClient({ url, headers }: Pick<FastifyRequest, 'url' | 'headers'>): boolean {
  if (/^\/v1\/messages(?:[/?]|$)/.test(url)) return true;
  return headers['anthropic-version'] !== undefined && /^\/v1\/models(?:[/?]|$)/.test(url);
}

/** The id that the response's header request-id carries, set where it is not yet. */
export function requestIdOf(reply: FastifyReply): string {
  const known = reply.getHeader('request-id');
  if (typeof known === 'string') return known;
  const { id } = reply.request;
  reply.header('request-id', id);
  return id;
}

export function toMessagesError({ status, message }: ApiError, requestId: string): MessagesError {
  const type = TYPES[status] ?? (status < 500 ? 'invalid_request_error' : 'api_error');
  return { type: 'error', error: { type, message }, request_id: requestId };
}
