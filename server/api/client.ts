import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import type { Choices } from './choices.js';
import type { ApiContext } from './context.js';

export function checkReady({ drain }: ApiContext): void {
  if (drain.isDraining) throw new ApiError('shutting_down', 'The server is shutting down; send the request elsewhere.');
}

/** Calls `onLeft` when the client leaves, and ends the choices when the server drains for too long. */
export function abortWithClient(
  context: ApiContext,
  request: FastifyRequest,
  reply: FastifyReply,
  choices: Choices,
  onLeft: () => void = () => choices.abort(),
): void {
  const leave = context.drain.enter(() => {
    for (const requestId of choices.requestIds()) context.engine.abort(requestId);
  });
  // 'close' comes after every response; before the response is written the client has left.
  reply.raw.once('close', () => {
    leave();
    if (!reply.raw.writableFinished) onLeft();
  });
  if (request.raw.socket.destroyed) {
    leave();
    onLeft();
  }
}
