import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { ChatBodies, wholeChat } from './chat-body.js';
import { jobOfChoice, readChatRequest, type ChatBody } from './chat-request.js';
import { Choices } from './choices.js';
import type { ApiContext } from './context.js';
import { streamChoices } from './stream.js';

export async function createChatCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Body: ChatBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const job = await readChatRequest(request.body, request.tenant, context);
  checkReady(context);
  const jobs = Array.from({ length: job.numChoices }, (_, index) => jobOfChoice(job, index));
  const choices = new Choices([jobs], context, request, startedAt);
  abortWithClient(choices, context, request, reply);
  if (job.isStream) {
    const bodies = jobs.map((own, index) => new ChatBodies(own, context, index));
    return streamChoices(context, choices, bodies, job, reply);
  }
  await choices.run(() => {});
  if (choices.isAborted) return reply.hijack();
  return reply.type('application/json; charset=utf-8').send(wholeChat(job, context, choices));
}

/** Ends the choices when the client leaves, or when the server drains for too long. */
export function abortWithClient(
  choices: Choices,
  context: ApiContext,
  request: FastifyRequest,
  reply: FastifyReply,
): void {
  const leave = context.drain.enter(() => {
    for (const requestId of choices.requestIds()) context.engine.abort(requestId);
  });
  // 'close' comes after every response; before the response is written the client has left.
  reply.raw.once('close', () => {
    leave();
    if (!reply.raw.writableFinished) choices.abort();
  });
  if (request.raw.socket.destroyed) {
    leave();
    choices.abort();
  }
}

export function checkReady({ drain }: ApiContext): void {
  if (drain.isDraining) throw new ApiError('shutting_down', 'The server is shutting down; send the request elsewhere.');
}
