import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ThinkingControl } from '../engine/request.js';
import { ApiError } from '../errors.js';
import type { Choices } from './choices.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

type ControlBody = components['schemas']['ControlRequest'];

interface Running {
  choices: Choices;
  tenant: string;
}

/** Choices whose stream is read now, by the response's id: those can be steered. */
export class RunningStreams {
  readonly #byId = new Map<string, Running>();

  /** They run until the response is over. Of two readers of one stream the later one's end counts. */
  enter(id: string, choices: Choices, { tenant }: FastifyRequest, reply: FastifyReply): void {
    const running = { choices, tenant };
    this.#byId.set(id, running);
    reply.raw.once('close', () => {
      if (this.#byId.get(id) === running) this.#byId.delete(id);
    });
  }

  find(id: string, tenant: string): Choices | undefined {
    const running = this.#byId.get(id);
    return running?.tenant === tenant ? running.choices : undefined;
  }
}

/** The handler of POST /v1/chat/completions/{id}/control: steers the reasoning of a stream that runs. */
export function controlChatCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Params: { id: string }; Body: ControlBody }>,
): components['schemas']['Control'] {
  const { id } = request.params;
  const { action, index } = request.body;
  const choices = context.running.find(id, request.tenant);
  if (choices === undefined) {
    const message = `No stream '${id.slice(0, 100)}' is running; take the id that its chunks have, before it ends.`;
    throw new ApiError('not_found', message, 'id');
  }
  if (index !== undefined && index >= choices.all.length) {
    const message = `'index' is ${index}; this stream's choices are 0 to ${choices.all.length - 1}.`;
    throw new ApiError('invalid_value', message, 'index');
  }
  if (context.prompts.markers.thinkEnd < 0) {
    const message = "This model's reasoning has no end marker that could be forced or held back.";
    throw new ApiError('unsupported_value', message, 'action');
  }
  const steered = choices.control(toControl(request.body, context), index);
  if (steered.length === 0) {
    throw new ApiError('not_reasoning', 'Reasoning is over, or has not begun; the answer cannot be steered.', 'action');
  }
  return { id, object: 'chat.completion.control', action, choices: steered };
}

/** Throws ApiError where the two fields do not go together. */
export function toControl({ action, tokens }: ControlBody, { maxModelLen }: ApiContext): ThinkingControl {
  if (action === 'end_thinking') {
    if (tokens === undefined) return { kind: 'end' };
    throw new ApiError('invalid_value', "'tokens' belongs to extend_thinking; remove it.", 'tokens');
  }
  if (tokens === undefined) {
    throw new ApiError('missing_required_parameter', "'tokens' must say by how many tokens to extend.", 'tokens');
  }
  if (tokens <= maxModelLen) return { kind: 'extend', numTokens: tokens };
  throw new ApiError('invalid_value', `'tokens' is ${tokens}; the context has ${maxModelLen}.`, 'tokens');
}
