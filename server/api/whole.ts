import { Readable } from 'node:stream';
import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ApiError } from '../errors.js';
import type { Choices } from './choices.js';
import { abortWithClient } from './client.js';
import type { ApiContext } from './context.js';
import { toApiError } from './error-handler.js';
import { orLate } from './late.js';

const TYPE = 'application/json; charset=utf-8';

/**
 * Answers with one JSON text when all choices have ended. Until then, from the first heartbeat on, empty lines keep
 * the connection alive; from there on an error comes with status 200, as the body.
 */
export async function sendWhole(
  context: ApiContext,
  choices: Choices,
  bodyOf: () => string,
  request: FastifyRequest,
  reply: FastifyReply,
  errorBodyOf: (error: ApiError) => string = (error) => JSON.stringify(error.toBody()),
): Promise<unknown> {
  const { heartbeatMs } = context.sse;
  abortWithClient(context, request, reply, choices);
  const run = choices.run(() => {});
  const started = await orLate(heartbeatMs, [run]);
  if (choices.isAborted) return reply.hijack(); // the client has left
  if (started !== 'late') return reply.type(TYPE).send(bodyOf());

  const lines = new Readable({ read: () => {} });
  const heartbeat = setInterval(() => lines.push('\n'), heartbeatMs);
  lines.once('close', () => clearInterval(heartbeat));
  lines.push('\n');
  void reply.type(TYPE).send(lines);
  const end = (body: string): void => {
    if (lines.destroyed) return;
    lines.push(body);
    lines.push(null);
  };
  run.then(
    () => {
      if (!choices.isAborted) end(bodyOf());
    },
    (error: unknown) => {
      const shown = toApiError(error);
      if (shown.code === 'internal_error') reply.log.error(error, 'a completion broke');
      end(errorBodyOf(shown));
    },
  );
  return reply;
}
