import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ApiError } from '../errors.js';
import { checkReady } from './client.js';
import type { ChatOutput, Piece } from './chat-output.js';
import { Choices, type Choice } from './choices.js';
import type { ApiContext } from './context.js';
import type { Dialect, StreamEvent } from './feed.js';
import { ContentBlocks, joinBlocks } from './messages-blocks.js';
import { requestIdOf, toMessagesError } from './messages-error.js';
import {
  countPromptTokens,
  readMessagesRequest,
  type CountBody,
  type MessagesBody,
  type MessagesJob,
} from './messages-request.js';
import type { components } from './openapi.js';
import { ChoiceStream } from './stream.js';
import { sendWhole } from './whole.js';

type Schemas = components['schemas'];

const PING = 'event: ping\ndata: {"type":"ping"}\n\n';

export async function createMessage(
  context: ApiContext,
  request: FastifyRequest<{ Body: MessagesBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const job = await readMessagesRequest(request.body, request.tenant, context);
  checkReady(context);
  const choices = new Choices([[job.chat]], context, request, startedAt);
  if (job.chat.isStream) {
    const dialect = new MessagesDialect(context, job, choices, requestIdOf(reply));
    const stream = new ChoiceStream(context, choices, dialect, { heartbeat: PING });
    return stream.begin(request, reply);
  }
  return sendWhole(
    context,
    choices,
    () => JSON.stringify(wholeMessage(context, job, choices)),
    request,
    reply,
    (error) => JSON.stringify(toMessagesError(error, requestIdOf(reply))),
  );
}

function wholeMessage(context: ApiContext, job: MessagesJob, choices: Choices): Schemas['Message'] {
  const output = outputOf(choices);
  const blocks = new ContentBlocks(job);
  const events = [...output.take().flatMap((piece) => blocks.push(piece)), ...blocks.end()];
  return {
    ...headOf(context, job),
    content: joinBlocks(events),
    ...stopOf(output, job),
    usage: usageOf(output),
  };
}

export async function countMessageTokens(
  context: ApiContext,
  request: FastifyRequest<{ Body: CountBody }>,
): Promise<Schemas['MessagesCount']> {
  return { input_tokens: await countPromptTokens(request.body, request.tenant, context) };
}

/** One message as its events. Where message_start had to come early, message_delta tells what came from the cache. */
class MessagesDialect implements Dialect {
  readonly #context: ApiContext;
  readonly #job: MessagesJob;
  readonly #choices: Choices;
  readonly #requestId: string;
  readonly #blocks: ContentBlocks;

  constructor(context: ApiContext, job: MessagesJob, choices: Choices, requestId: string) {
    this.#context = context;
    this.#job = job;
    this.#choices = choices;
    this.#requestId = requestId;
    this.#blocks = new ContentBlocks(job);
  }

  begin(): StreamEvent[] {
    const usage = usageOf(outputOf(this.#choices));
    const head = headOf(this.#context, this.#job);
    return named({
      type: 'message_start',
      message: { ...head, content: [], stop_reason: null, stop_sequence: null, usage },
    });
  }

  piece(_choice: Choice, piece: Piece): StreamEvent[] {
    return named(...this.#blocks.push(piece));
  }

  finish({ completion }: Choice): StreamEvent[] {
    const { output } = completion!;
    return named(
      ...this.#blocks.end(),
      { type: 'message_delta', delta: stopOf(output, this.#job), usage: usageOf(output) },
      { type: 'message_stop' },
    );
  }

  end(): StreamEvent[] {
    return [];
  }

  fail(error: ApiError): StreamEvent[] {
    return named(toMessagesError(error, this.#requestId));
  }
}

function named(...events: Schemas['MessagesEvent'][]): StreamEvent[] {
  return events.map((event) => ({ name: event.type, data: JSON.stringify(event) }));
}

function outputOf({ all }: Choices): ChatOutput {
  return all[0]!.completion!.output;
}

function headOf(
  { modelNames }: ApiContext,
  { chat }: MessagesJob,
): Pick<Schemas['Message'], 'id' | 'type' | 'role' | 'model'> {
  return { id: chat.engineRequest.requestId, type: 'message', role: 'assistant', model: modelNames[0]! };
}

function stopOf(output: ChatOutput, { fillsContext }: MessagesJob): Schemas['MessageDeltaEvent']['delta'] {
  const { finishReason, matchedStop } = output;
  if (matchedStop !== null) return { stop_reason: 'stop_sequence', stop_sequence: matchedStop };
  if (finishReason === 'length') {
    return { stop_reason: fillsContext ? 'model_context_window_exceeded' : 'max_tokens', stop_sequence: null };
  }
  return { stop_reason: finishReason === 'tool_calls' ? 'tool_use' : 'end_turn', stop_sequence: null };
}

function usageOf({ usage }: ChatOutput): Schemas['MessagesUsage'] {
  return {
    input_tokens: usage.prompt_cache_miss_tokens,
    cache_read_input_tokens: usage.prompt_cache_hit_tokens,
    cache_creation_input_tokens: 0,
    output_tokens: usage.completion_tokens,
    output_tokens_details: { thinking_tokens: usage.completion_tokens_details.reasoning_tokens },
  };
}
