import type { ApiError } from '../errors.js';
import type { ChatOutput, Usage } from './chat-output.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';
import { ResponseOutput } from './response-output.js';
import type { ResponseJob, ResponsesBody } from './response-request.js';
import type { StoredResponse } from './response-store.js';

type Schemas = components['schemas'];
export type ResponseStatus = Schemas['ResponseStatus'];

/** One response from its first moment to its end: what of it is known, as clients see it. */
export class ResponseRecord {
  readonly output: ResponseOutput;
  readonly #job: ResponseJob;
  /** what does not change while it is made */
  readonly #head: ReturnType<typeof headOf>;
  #status: ResponseStatus;
  #completedAt: number | null = null;
  #error: Schemas['Response']['error'] = null;
  #usage: Schemas['ResponseUsage'] | null = null;
  #reasoningEnded: ChatOutput['reasoningEnded'] = null;

  constructor(job: ResponseJob, context: ApiContext) {
    this.#job = job;
    this.#head = headOf(job, context);
    this.#status = job.isInBackground ? 'queued' : 'in_progress';
    this.output = new ResponseOutput({
      encodesReasoning: (job.body.include ?? []).includes('reasoning.encrypted_content'),
    });
  }

  get id(): string {
    return this.#job.chat.engineRequest.requestId;
  }

  get job(): ResponseJob {
    return this.#job;
  }

  get status(): ResponseStatus {
    return this.#status;
  }

  get isOver(): boolean {
    return this.#status !== 'queued' && this.#status !== 'in_progress';
  }

  begin(): void {
    this.#status = 'in_progress';
  }

  /** The model has ended it, or the token limit has. */
  finish(output: ChatOutput): void {
    const isCut = output.finishReason === 'length';
    this.#end(isCut ? 'incomplete' : 'completed', output);
    if (!isCut) this.#completedAt = Math.floor(Date.now() / 1000);
  }

  cancel(output: ChatOutput | undefined): void {
    this.#end('cancelled', output);
  }

  fail({ code, message }: ApiError, output: ChatOutput | undefined): void {
    this.#end('failed', output);
    const kind = code === 'queue_full' ? 'rate_limit_exceeded' : 'server_error';
    // What is wrong with a request shows before it runs, but for formats that turn out to be too large.
    this.#error = { code: code === 'invalid_value' ? 'invalid_prompt' : kind, message };
  }

  /** JSON text, because a seed may have 64 bits. */
  get json(): string {
    const { seed } = this.#job.chat.engineRequest.sampling;
    const isLimited = this.#status === 'incomplete';
    // The database of responses relies on what comes first.
    const body: Omit<Schemas['Response'], 'seed'> = {
      id: this.id,
      object: 'response',
      status: this.#status,
      error: this.#error,
      ...this.#head,
      completed_at: this.#completedAt,
      incomplete_details: isLimited ? { reason: 'max_output_tokens' } : null,
      output: this.output.items,
      ...(this.#reasoningEnded ? { reasoning_ended: this.#reasoningEnded } : {}),
      ...(this.#usage ? { usage: this.#usage } : {}),
    };
    return `${JSON.stringify(body).slice(0, -1)},"seed":${BigInt.asIntN(64, seed)}}`;
  }

  /** As it is kept for whoever asks for it or goes on with it. */
  stored(tenant: string): StoredResponse {
    return {
      id: this.id,
      tenant,
      previousId: this.#job.body.previous_response_id ?? null,
      status: this.#status,
      input: JSON.stringify(this.#job.input),
      body: this.json,
    };
  }

  #end(status: ResponseStatus, output: ChatOutput | undefined): void {
    this.#status = status;
    this.#reasoningEnded = output?.reasoningEnded ?? null;
    this.#usage = output ? toResponseUsage(output.usage) : null;
  }
}

function headOf({ chat, body, isStored, isInBackground }: ResponseJob, { modelNames }: ApiContext) {
  const { sampling } = chat.engineRequest;
  return {
    created_at: chat.created,
    background: isInBackground,
    instructions: body.instructions ?? null,
    max_output_tokens: body.max_output_tokens ?? null,
    max_tool_calls: body.max_tool_calls ?? null,
    model: modelNames[0]!,
    parallel_tool_calls: body.parallel_tool_calls ?? true,
    previous_response_id: body.previous_response_id ?? null,
    prompt_cache_key: body.prompt_cache_key ?? null,
    reasoning: { effort: body.reasoning?.effort ?? null, summary: null },
    safety_identifier: body.safety_identifier ?? null,
    service_tier: 'default' as const,
    store: isStored,
    temperature: sampling.temperature,
    text: { format: { ...(body.text?.format ?? { type: 'text' }) }, verbosity: 'medium' as const },
    tool_choice: body.tool_choice ?? 'auto',
    tools: (body.tools ?? []).map(toToolBody),
    top_logprobs: body.top_logprobs ?? 0,
    top_p: sampling.topP,
    truncation: 'disabled' as const,
    metadata: body.metadata ?? {},
  };
}

function toToolBody(tool: NonNullable<ResponsesBody['tools']>[number]): Schemas['ResponsesTool'] {
  const { name, description, parameters, strict } = tool;
  const described = description === undefined ? {} : { description };
  return { type: 'function', name, ...described, parameters: parameters ?? null, strict: strict ?? false };
}

export function toResponseUsage(usage: Usage): Schemas['ResponseUsage'] {
  return {
    input_tokens: usage.prompt_tokens,
    input_tokens_details: { cached_tokens: usage.prompt_cache_hit_tokens, cache_write_tokens: 0 },
    output_tokens: usage.completion_tokens,
    output_tokens_details: { reasoning_tokens: usage.completion_tokens_details.reasoning_tokens },
    total_tokens: usage.total_tokens,
  };
}
