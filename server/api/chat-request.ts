import { randomBytes, randomUUID } from 'node:crypto';
import type { EngineRequest, SamplingParams } from '../engine/request.js';
import { ApiError } from '../errors.js';
import type { StopScope } from '../text/output-parser.js';
import type { ApiContext } from './context.js';
import { readConversation, tooLong, type AskedConversation } from './conversation.js';
import { toRequestGrammar } from './output-format.js';
import { answerFormat } from './tool-grammar.js';
import { SEED_SOURCE, type JsonBody } from './json-body.js';
import type { components } from './openapi.js';
import { checkThinking, readThinking, thinkingLimits } from './thinking.js';
import { paramOf } from './validation-error.js';

export type ChatBody = components['schemas']['ChatCompletionRequest'];

/** Where reasoning goes: a field of its own, the content, or nowhere. */
export type ReasoningView = 'separate' | 'inline' | 'hidden';

/** A chat request, checked, rendered and ready for the engine. */
export interface ChatJob {
  /** of the response, the same for all choices */
  id: string;
  engineRequest: EngineRequest;
  /** what this answers; null where no conversation comes back with it */
  asked: AskedConversation | null;
  stops: readonly string[];
  stopScope: StopScope;
  /** the field that said the answer's format; null where the answer is free */
  formatParam: string | null;
  isStream: boolean;
  includeUsage: boolean;
  /** usage so far in every chunk */
  hasContinuousUsage: boolean;
  returnTokenIds: boolean;
  returnMetrics: boolean;
  /** no conversation: everything is text */
  isPlain: boolean;
  reasoningView: ReasoningView;
  /** false: in one piece, when it has ended */
  streamsReasoning: boolean;
  /** the first call ends the completion */
  hasOneCall: boolean;
  /** choices with this prompt */
  numChoices: number;
  /** Unix seconds */
  created: number;
}

export interface ReadOptions {
  /** a limit beyond the context is the context's rest; the caller says so to its client */
  mayFillContext?: boolean;
  /** the prompt is computed, up to where an answer would begin, and nothing is generated */
  isPrefillOnly?: boolean;
}

/** Throws ApiError for whatever cannot be served. `tenant` keeps the cached prefixes of different keys apart. */
export async function readChatRequest(
  body: ChatBody,
  tenant: string,
  context: ApiContext,
  { mayFillContext = false, isPrefillOnly = false }: ReadOptions = {},
): Promise<ChatJob> {
  checkModel(body.model, context);
  checkStreamOptions(body);
  const stops = readStops(body.stop);
  const logprobs = readLogprobs(body);
  const sampling = readSampling(body, context, logprobs);
  const format = answerFormat(body, context.formats.read(body), context.formats, context.prompts);
  if (format && context.prompts.form === 'r1-zero') {
    const message = "This model's reasoning is marked in its text, so its answer alone cannot be held to a format.";
    throw new ApiError('unsupported_value', message, format.param);
  }
  if (format && body.ignore_eos) {
    const message = `'ignore_eos' would go on behind the end of what '${format.param}' asks for; remove it.`;
    throw new ApiError('invalid_value', message, 'ignore_eos');
  }
  const wish = readThinking(body);
  checkThinking(wish, body, context);
  checkTurn(body);
  const cacheSalt = cacheSaltOf(tenant, body.cache_salt);
  const conversation = isPrefillOnly ? { ...body, add_generation_prompt: false } : body;
  const { ids: promptIds, startPhase, asked } = await readConversation(conversation, wish, context, cacheSalt);
  sampling.maxTokens = readMaxTokens(body, promptIds.length, context.maxModelLen, 'messages', mayFillContext);
  checkMinTokens(sampling);
  const thinking = thinkingLimits(wish, body, sampling.maxTokens, context);
  const id = `chatcmpl-${randomUUID().replaceAll('-', '')}`;
  return {
    id,
    engineRequest: {
      requestId: id,
      promptIds,
      sampling,
      markers: context.prompts.markers,
      startPhase,
      cacheSalt,
      priority: body.priority ?? 0,
      ...(thinking ? { thinking } : {}),
      ...(format && !isPrefillOnly ? { grammar: toRequestGrammar(format.grammar, context.defaults.eosTokenIds) } : {}),
      ...(isPrefillOnly ? { prefillOnly: true } : {}),
    },
    asked: isPrefillOnly ? null : asked,
    stops,
    stopScope: body.stop_scope ?? 'answer',
    formatParam: format?.param ?? null,
    isStream: body.stream === true,
    includeUsage: body.stream_options?.include_usage === true,
    hasContinuousUsage: body.stream_options?.continuous_usage_stats === true,
    returnTokenIds: body.return_token_ids === true,
    returnMetrics: body.metrics === true,
    isPlain: false,
    reasoningView: readReasoningView(body, context),
    streamsReasoning: body.stream_reasoning !== false,
    hasOneCall: body.parallel_tool_calls === false,
    numChoices: body.n ?? 1,
    created: Math.floor(Date.now() / 1000),
  };
}

/** Choice i of a request: an engine request of its own, with the seed plus i. */
export function jobOfChoice(job: ChatJob, index: number): ChatJob {
  if (index === 0) return job;
  const { engineRequest } = job;
  const { sampling, requestId } = engineRequest;
  const seed = BigInt.asUintN(64, sampling.seed + BigInt(index));
  return {
    ...job,
    engineRequest: { ...engineRequest, requestId: `${requestId}-${index}`, sampling: { ...sampling, seed } },
  };
}

export function cacheSaltOf(tenant: string, salt: string | null | undefined): string {
  return tenant || salt ? JSON.stringify([tenant, salt ?? '']) : '';
}

export function checkStreamOptions(body: Pick<ChatBody, 'stream' | 'stream_options'>): void {
  if (!body.stream_options || body.stream) return;
  throw new ApiError('invalid_value', "'stream_options' is only allowed with 'stream': true.", 'stream_options');
}

export function checkMinTokens({ minTokens, maxTokens }: SamplingParams): void {
  if (minTokens <= maxTokens) return;
  throw new ApiError(
    'invalid_value',
    `'min_tokens' is ${minTokens}, more than the ${maxTokens} tokens that the completion may have.`,
    'min_tokens',
  );
}

function checkTurn({ add_generation_prompt: opensTurn, continue_final_message: goesOn }: ChatBody): void {
  if (opensTurn !== false || goesOn === true) return;
  const message = "'add_generation_prompt' may only be false with 'continue_final_message': a completion needs a turn.";
  throw new ApiError('invalid_value', message, 'add_generation_prompt');
}

function readReasoningView(body: ChatBody, { config }: ApiContext): ReasoningView {
  const exclude = body.reasoning?.exclude;
  const include = body.include_reasoning;
  if (typeof exclude === 'boolean' && typeof include === 'boolean' && exclude === include) {
    const message = "'include_reasoning' and 'reasoning.exclude' contradict each other; give one of them.";
    throw new ApiError('invalid_value', message, 'reasoning.exclude');
  }
  if (include === false || exclude === true) return 'hidden';
  const separate = body.separate_reasoning ?? config.reasoningFormat !== 'none';
  return separate ? 'separate' : 'inline';
}

export function checkModel(model: string, { modelNames }: ApiContext): void {
  if (modelNames.includes(model)) return;
  const names = modelNames.map((name) => `'${name}'`).join(', ');
  throw new ApiError(
    'model_not_found',
    `The model '${model.slice(0, 200)}' is not served here; use ${names}.`,
    'model',
  );
}

type SamplingBody = Pick<
  ChatBody,
  | 'stop_token_ids'
  | 'ignore_eos'
  | 'logit_bias'
  | 'top_k'
  | 'temperature'
  | 'top_p'
  | 'min_p'
  | 'seed'
  | 'presence_penalty'
  | 'frequency_penalty'
  | 'repetition_penalty'
  | 'min_tokens'
> & { tool_choice?: ChatBody['tool_choice'] };

export function readSampling(
  body: SamplingBody,
  { defaults, spec, prompts }: ApiContext,
  numLogprobs: number,
): SamplingParams {
  const stopTokenIds = [...(body.stop_token_ids ?? [])];
  stopTokenIds.forEach((id, index) => checkTokenId(id, spec.vocabSize, `stop_token_ids[${index}]`));
  if (!body.ignore_eos) stopTokenIds.push(...defaults.eosTokenIds);
  const logitBias = Object.entries(body.logit_bias ?? {}).map(([key, bias]): [number, number] => {
    const param = paramOf(`/logit_bias/${key.slice(0, 40)}`)!;
    if (!/^-?\d+$/.test(key)) throw new ApiError('invalid_value', `'${param}' must be named by a token id.`, param);
    checkTokenId(Number(key), spec.vocabSize, param);
    return [Number(key), bias];
  });
  const { toolCallsBegin } = prompts.markers;
  const bansTools = body.tool_choice === 'none' && toolCallsBegin >= 0;
  const topK = body.top_k ?? defaults.topK ?? 0;
  return {
    temperature: body.temperature ?? (defaults.doSample === false ? 0 : (defaults.temperature ?? 1)),
    topP: body.top_p ?? defaults.topP ?? 1,
    topK: topK === -1 ? 0 : topK,
    minP: body.min_p ?? defaults.minP ?? 0,
    seed: readSeed(body),
    presencePenalty: body.presence_penalty ?? 0,
    frequencyPenalty: body.frequency_penalty ?? 0,
    repetitionPenalty: body.repetition_penalty ?? defaults.repetitionPenalty ?? 1,
    logitBias: bansTools
      ? [...logitBias.filter(([id]) => id !== toolCallsBegin), [toolCallsBegin, -Infinity]]
      : logitBias,
    stopTokenIds: [...new Set(stopTokenIds)],
    minTokens: body.min_tokens ?? 0,
    maxTokens: 0,
    numLogprobs,
  };
}

export function checkTokenId(id: number, vocabSize: number, param: string): void {
  if (Number.isSafeInteger(id) && id >= 0 && id < vocabSize) return;
  const message = `'${param}' is no token of this model: ids go from 0 to ${vocabSize - 1}; it is ${id}.`;
  throw new ApiError('token_out_of_vocabulary', message, param);
}

export function readStops(stop: ChatBody['stop']): readonly string[] {
  const stops = typeof stop === 'string' ? [stop] : (stop ?? []);
  stops.forEach((text, index) => {
    if (!/\p{Surrogate}/u.test(text)) return;
    const param = typeof stop === 'string' ? 'stop' : `stop[${index}]`;
    throw new ApiError('invalid_value', `'${param}' holds half of a surrogate pair; send whole characters.`, param);
  });
  return stops;
}

function readLogprobs({ logprobs, top_logprobs: top }: ChatBody): number {
  if (top !== undefined && top !== null && !logprobs) {
    throw new ApiError('invalid_value', "'top_logprobs' needs 'logprobs': true.", 'top_logprobs');
  }
  return logprobs ? (top ?? 0) : -1;
}

/** Given seeds are 64 bits, drawn ones fit into a JSON number of any client. */
function readSeed(body: Pick<ChatBody, 'seed'>): bigint {
  if (body.seed === undefined || body.seed === null) return randomBytes(8).readBigUInt64LE() & ((1n << 53n) - 1n);
  const source = (body as Partial<JsonBody>)[SEED_SOURCE] ?? String(body.seed);
  const seed = /^-?\d+$/.test(source) ? BigInt(source) : null;
  if (seed === null || seed < -(1n << 63n) || seed >= 1n << 63n) {
    throw new ApiError('invalid_value', "'seed' must be an integer of 64 bits, written without exponent.", 'seed');
  }
  return BigInt.asUintN(64, seed);
}

export function readMaxTokens(
  body: Pick<ChatBody, 'max_tokens' | 'max_completion_tokens'>,
  numPromptTokens: number,
  maxModelLen: number,
  promptParam: string,
  mayFillContext = false,
): number {
  const { max_tokens: older, max_completion_tokens: newer } = body;
  if (older && newer && older !== newer) {
    throw new ApiError(
      'invalid_value',
      "'max_tokens' and 'max_completion_tokens' differ; give one of them.",
      'max_tokens',
    );
  }
  if (numPromptTokens >= maxModelLen) {
    throw new ApiError('context_length_exceeded', tooLong(numPromptTokens, maxModelLen), promptParam);
  }
  const wanted = newer ?? older;
  const rest = maxModelLen - numPromptTokens;
  if (wanted && wanted > rest && !mayFillContext) {
    throw new ApiError(
      'context_length_exceeded',
      `The context has ${maxModelLen} tokens and the prompt ${numPromptTokens}; ask for at most ${rest}, or leave it out.`,
      newer ? 'max_completion_tokens' : 'max_tokens',
    );
  }
  return Math.min(wanted ?? rest, rest);
}
