import type { ReasoningField } from '../config.js';
import type { ChatOutput, FinishReason, Piece, ToolCallPiece, Usage } from './chat-output.js';
import type { ChatJob } from './chat-request.js';
import type { ApiContext } from './context.js';
import { choiceLogprobs } from './logprobs.js';
import type { components } from './openapi.js';

type Schemas = components['schemas'];

/** Bodies of one completion: the whole answer, or its chunks. JSON text, because a seed may have 64 bits. */
export class ChatBodies {
  readonly #job: ChatJob;
  readonly #reasoningField: ReasoningField;
  readonly #model: string;
  readonly #fingerprint: string;
  readonly #seed: string;
  #isFirst = true;

  constructor(job: ChatJob, { config, modelNames, systemFingerprint }: ApiContext) {
    this.#job = job;
    this.#reasoningField = config.reasoningField;
    this.#model = modelNames[0]!;
    this.#fingerprint = systemFingerprint;
    this.#seed = BigInt.asIntN(64, job.engineRequest.sampling.seed).toString();
  }

  whole(output: ChatOutput, pieces: readonly Piece[]): string {
    const { returnTokenIds, returnMetrics, engineRequest } = this.#job;
    const reasoning = textOf(pieces, 'reasoning');
    const toolCalls = joinToolCalls(pieces);
    const body: Omit<Schemas['ChatCompletion'], 'seed'> = {
      ...this.#head('chat.completion'),
      choices: [
        {
          index: 0,
          message: {
            role: 'assistant',
            content: textOf(pieces, 'content') || null,
            ...(reasoning ? this.#reasoning(reasoning) : {}),
            ...(toolCalls.length ? { tool_calls: toolCalls } : {}),
            refusal: null,
          },
          finish_reason: output.finishReason!,
          logprobs: this.#logprobs(pieces),
          ...(returnTokenIds ? { token_ids: pieces.flatMap((piece) => piece.tokenIds) } : {}),
        },
      ],
      usage: output.usage,
      ...(returnTokenIds ? { prompt_token_ids: engineRequest.promptIds } : {}),
      ...(returnMetrics ? { metrics: output.metrics } : {}),
    };
    return this.#withSeed(JSON.stringify(body));
  }

  piece(piece: Piece): string {
    return this.#chunk(this.#deltaOf(piece), [piece], null);
  }

  /** the chunk that ends the choice; `rest` are pieces without text */
  finish(output: ChatOutput, rest: readonly Piece[]): string {
    const metrics = this.#job.returnMetrics ? { metrics: output.metrics } : {};
    return this.#chunk(this.#isFirst ? { content: '' } : {}, rest, output.finishReason, metrics);
  }

  usage(usage: Usage): string {
    return JSON.stringify({ ...this.#head('chat.completion.chunk'), choices: [], usage });
  }

  #chunk(
    delta: Schemas['Delta'],
    pieces: readonly Piece[],
    reason: FinishReason | null,
    more: Pick<Schemas['ChatCompletionChunk'], 'metrics'> = {},
  ): string {
    const isFirst = this.#isFirst;
    const { returnTokenIds, includeUsage, engineRequest } = this.#job;
    const chunk: Schemas['ChatCompletionChunk'] = {
      ...this.#head('chat.completion.chunk'),
      choices: [
        {
          index: 0,
          delta: isFirst ? { role: 'assistant', ...delta } : delta,
          finish_reason: reason,
          logprobs: pieces.some((piece) => piece.logprobs.length) ? this.#logprobs(pieces) : null,
          ...(returnTokenIds ? { token_ids: pieces.flatMap((piece) => piece.tokenIds) } : {}),
        },
      ],
      ...(includeUsage ? { usage: null } : {}),
      ...(returnTokenIds && isFirst ? { prompt_token_ids: engineRequest.promptIds } : {}),
      ...more,
    };
    this.#isFirst = false;
    const text = JSON.stringify(chunk);
    return isFirst ? this.#withSeed(text) : text;
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

  #head<Type extends string>(object: Type) {
    const { created, engineRequest } = this.#job;
    const id = engineRequest.requestId;
    return { id, object, created, model: this.#model, system_fingerprint: this.#fingerprint };
  }

  #withSeed(json: string): string {
    return `${json.slice(0, -1)},"seed":${this.#seed}}`;
  }
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
