import type { ReasoningField } from '../config.js';
import type { ChatOutput, Piece, ToolCallPiece, Usage } from './chat-output.js';
import type { ChatJob } from './chat-request.js';
import type { Choices } from './choices.js';
import type { ApiContext } from './context.js';
import { choiceLogprobs } from './logprobs.js';
import type { components } from './openapi.js';
import type { ChunkBodies } from './chunk-dialect.js';

type Schemas = components['schemas'];

/** The whole answer. JSON text, because a seed may have 64 bits. */
export function wholeChat(job: ChatJob, context: ApiContext, choices: Choices): string {
  const { returnTokenIds, engineRequest } = job;
  const body: Omit<Schemas['ChatCompletion'], 'seed'> = {
    ...headOf(job, context, 'chat.completion'),
    choices: choices.all.map(({ job: own, index, completion }) =>
      new ChatBodies(own, context, index).choice(completion!.output, completion!.output.take()),
    ),
    usage: choices.usage,
    ...(job.returnMetrics ? { metrics: choices.metrics } : {}),
    ...(returnTokenIds ? { prompt_token_ids: engineRequest.promptIds } : {}),
  };
  return withSeed(JSON.stringify(body), job);
}

/** Bodies of one choice: the whole one, or its chunks. */
export class ChatBodies implements ChunkBodies {
  readonly #job: ChatJob;
  readonly #context: ApiContext;
  readonly #reasoningField: ReasoningField;
  readonly #index: number;
  #isFirst = true;

  constructor(job: ChatJob, context: ApiContext, index = 0) {
    this.#job = job;
    this.#context = context;
    this.#reasoningField = context.config.reasoningField;
    this.#index = index;
  }

  choice(output: ChatOutput, pieces: readonly Piece[]): Schemas['ChatCompletionChoice'] {
    const reasoning = textOf(pieces, 'reasoning');
    const toolCalls = joinToolCalls(pieces);
    return {
      index: this.#index,
      message: {
        role: 'assistant',
        content: textOf(pieces, 'content') || null,
        ...(reasoning ? this.#reasoning(reasoning) : {}),
        ...(toolCalls.length ? { tool_calls: toolCalls } : {}),
        refusal: null,
      },
      finish_reason: output.finishReason!,
      logprobs: this.#logprobs(pieces),
      ...(this.#job.returnTokenIds ? { token_ids: pieces.flatMap((piece) => piece.tokenIds) } : {}),
      ...(output.reasoningEnded ? { reasoning_ended: output.reasoningEnded } : {}),
    };
  }

  piece(piece: Piece, usage: Usage | null | undefined): string {
    return this.#chunk(this.#deltaOf(piece), [piece], null, usage);
  }

  finish(output: ChatOutput, rest: readonly Piece[], usage: Usage | null | undefined): string {
    return this.#chunk(this.#isFirst ? { content: '' } : {}, rest, output, usage);
  }

  usage(usage: Usage): string {
    const head = headOf(this.#job, this.#context, 'chat.completion.chunk');
    return JSON.stringify({ ...head, choices: [], usage });
  }

  #chunk(
    delta: Schemas['Delta'],
    pieces: readonly Piece[],
    ended: ChatOutput | null,
    usage: Usage | null | undefined,
  ): string {
    const isFirst = this.#isFirst;
    const { returnTokenIds, engineRequest } = this.#job;
    const chunk: Schemas['ChatCompletionChunk'] = {
      ...headOf(this.#job, this.#context, 'chat.completion.chunk'),
      choices: [
        {
          index: this.#index,
          delta: isFirst ? { role: 'assistant', ...delta } : delta,
          finish_reason: ended?.finishReason ?? null,
          logprobs: pieces.some((piece) => piece.logprobs.length) ? this.#logprobs(pieces) : null,
          ...(returnTokenIds ? { token_ids: pieces.flatMap((piece) => piece.tokenIds) } : {}),
          ...(ended?.reasoningEnded ? { reasoning_ended: ended.reasoningEnded } : {}),
        },
      ],
      ...(usage === undefined ? {} : { usage }),
      ...(returnTokenIds && isFirst ? { prompt_token_ids: engineRequest.promptIds } : {}),
      ...(ended && this.#job.returnMetrics ? { metrics: ended.metrics } : {}),
    };
    this.#isFirst = false;
    const text = JSON.stringify(chunk);
    return isFirst ? withSeed(text, this.#job) : text;
  }

  #deltaOf({ kind, text, toolCall }: Piece): Schemas['Delta'] {
    switch (kind) {
      case 'reasoning':
        return this.#reasoning(text);
      case 'tool_call':
        return { tool_calls: [toolCallDelta(toolCall!)] };
      case 'content':
        return { content: text };
      case null:
        return {};
    }
  }

  #reasoning(text: string): Pick<Schemas['Delta'], 'reasoning' | 'reasoning_content'> {
    switch (this.#reasoningField) {
      case 'reasoning':
        return { reasoning: text };
      case 'both':
        return { reasoning_content: text, reasoning: text };
      case 'reasoning_content':
        return { reasoning_content: text };
    }
  }

  #logprobs(pieces: readonly Piece[]): Schemas['ChoiceLogprobs'] | null {
    return choiceLogprobs(pieces, this.#job.engineRequest.sampling.numLogprobs >= 0);
  }
}

export function headOf<Type extends string>({ id, created }: ChatJob, context: ApiContext, object: Type) {
  const { modelNames, systemFingerprint } = context;
  return { id, object, created, model: modelNames[0]!, system_fingerprint: systemFingerprint };
}

export function withSeed(json: string, { engineRequest }: ChatJob): string {
  return `${json.slice(0, -1)},"seed":${BigInt.asIntN(64, engineRequest.sampling.seed)}}`;
}

function textOf(pieces: readonly Piece[], kind: Piece['kind']): string {
  return pieces.map((piece) => (piece.kind === kind ? piece.text : '')).join('');
}

function joinToolCalls(pieces: readonly Piece[]): Schemas['ToolCall'][] {
  const calls: Schemas['ToolCall'][] = [];
  for (const { toolCall } of pieces) {
    if (!toolCall) continue;
    const { index, id, name, arguments: args } = toolCall;
    const call = calls[index];
    if (call) call.function.arguments += args;
    else calls[index] = { id: id!, type: 'function', function: { name: name!, arguments: args } };
  }
  return calls;
}

function toolCallDelta({ index, id, name, arguments: args }: ToolCallPiece): Schemas['ToolCallDelta'] {
  if (id === undefined) return { index, function: { arguments: args } };
  return { index, id, type: 'function', function: { name: name!, arguments: args } };
}
