import type { FastifyReply, FastifyRequest } from 'fastify';
import { ChatBodies, wholeChat } from './chat-body.js';
import { jobOfChoice, readChatRequest, type ChatBody } from './chat-request.js';
import { Choices } from './choices.js';
import { ChunkDialect } from './chunk-dialect.js';
import { checkReady } from './client.js';
import type { ApiContext } from './context.js';
import { ChoiceStream } from './stream.js';
import { checkVote, sendVote } from './vote.js';
import { sendWhole } from './whole.js';

export async function createChatCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Body: ChatBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const job = await readChatRequest(request.body, request.tenant, context);
  checkReady(context);
  if (request.body.vote) checkVote(request.body, job);
  const jobs = Array.from({ length: job.numChoices }, (_, index) => jobOfChoice(job, index));
  const choices = new Choices([jobs], context, request, startedAt);
  if (request.body.vote) return sendVote(context, job, choices, request, reply);
  if (!job.isStream) {
    return sendWhole(context, choices, () => wholeChat(job, context, choices), request, reply);
  }
  const bodies = jobs.map((own, index) => new ChatBodies(own, context, index));
  const { resumable } = context;
  const isKept = resumable.seconds > 0;
  const options = isKept ? { keptAs: job.id } : {};
  const stream = new ChoiceStream(context, choices, new ChunkDialect(choices, bodies, job), options);
  context.running.enter(job.id, choices, request, reply);
  if (isKept) resumable.enter(job.id, { stream, tenant: request.tenant }, reply);
  return stream.begin(request, reply);
}
