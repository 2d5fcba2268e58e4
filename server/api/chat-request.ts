import { randomBytes, randomUUID } from 'node:crypto';
import type { EngineRequest, SamplingParams } from '../engine/request.js';
import { ApiError } from '../errors.js';
import type { ApiContext } from './context.js';
import { readConversation, tooLong } from './conversation.js';
import { toRequestGrammar } from './output-format.js';
import { answerFormat } from './tool-grammar.js';
import { SEED_SOURCE, type JsonBody } from './json-body.js';
import type { components } from './openapi.js';
import { paramOf } from './validation-error.js';

export type ChatBody = components['schemas']['ChatCompletionRequest'];

/** A chat request, checked, rendered and ready for the engine. */
export interface ChatJob {
  engineRequest: EngineRequest;
  stops: readonly string[];
  /** the field that said the answer's format; null where the answer is free */
  formatParam: string | null;
  isStream: boolean;
  includeUsage: boolean;
  returnTokenIds: boolean;
  /** Unix seconds */
  created: number;
}

/** Throws ApiError for whatever cannot be served. `tenant` keeps the cached prefixes of different keys apart. */
export async function readChatRequest(body: ChatBody, tenant: string, context: ApiContext): Promise<ChatJob> {
  checkModel(body.model, context);
  if (body.stream_options && !body.stream) {
    throw new ApiError('invalid_value', "'stream_options' is only allowed with 'stream': true.", 'stream_options');
  }
  const stops = readStops(body.stop);
  const logprobs = readLogprobs(body);
  const sampling = readSampling(body, context, logprobs);
  const format = answerFormat(body, context.formats.read(body), context.formats, context.prompts);
  if (format && body.ignore_eos) {
    const message = `'ignore_eos' would go on behind the end of what '${format.param}' asks for; remove it.`;
    throw new ApiError('invalid_value', message, 'ignore_eos');
  }
  const { ids: promptIds, startPhase } = await readConversation(body, context);
  sampling.maxTokens = readMaxTokens(body, promptIds.length, context.maxModelLen);
  if (sampling.minTokens > sampling.maxTokens) {
    throw new ApiError(
      'invalid_value',
      `'min_tokens' is ${sampling.minTokens}, more than the ${sampling.maxTokens} tokens that the completion may have.`,
      'min_tokens',
    );
  }
  return {
    engineRequest: {
      requestId: `chatcmpl-${randomUUID().replaceAll('-', '')}`,
      promptIds,
      sampling,
      markers: context.prompts.markers,
      startPhase,
      cacheSalt: tenant || body.cache_salt ? JSON.stringify([tenant, body.cache_salt ?? '']) : '',
      ...(format ? { grammar: toRequestGrammar(format.grammar, context.defaults.eosTokenIds) } : {}),
    },
    stops,
    formatParam: format?.param ?? null,
    isStream: body.stream === true,
    includeUsage: body.stream_options?.include_usage === true,
    returnTokenIds: body.return_token_ids === true,
    created: Math.floor(Date.now() / 1000),
  };
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

function readSampling(body: ChatBody, { defaults, spec, prompts }: ApiContext, numLogprobs: number): SamplingParams {
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

function checkTokenId(id: number, vocabSize: number, param: string): void {
  if (Number.isSafeInteger(id) && id >= 0 && id < vocabSize) return;
  const message = `'${param}' is no token of this model: ids go from 0 to ${vocabSize - 1}; it is ${id}.`;
  throw new ApiError('token_out_of_vocabulary', message, param);
}

function readStops(stop: ChatBody['stop']): readonly string[] {
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
function readSeed(body: ChatBody): bigint {
  if (body.seed === undefined || body.seed === null) return randomBytes(8).readBigUInt64LE() & ((1n << 53n) - 1n);
  const source = (body as JsonBody)[SEED_SOURCE] ?? String(body.seed);
  const seed = /^-?\d+$/.test(source) ? BigInt(source) : null;
  if (seed === null || seed < -(1n << 63n) || seed >= 1n << 63n) {
    throw new ApiError('invalid_value', "'seed' must be an integer of 64 bits, written without exponent.", 'seed');
  }
  return BigInt.asUintN(64, seed);
}

function readMaxTokens(body: ChatBody, numPromptTokens: number, maxModelLen: number): number {
  const { max_tokens: older, max_completion_tokens: newer } = body;
  if (older && newer && older !== newer) {
    throw new ApiError(
      'invalid_value',
      "'max_tokens' and 'max_completion_tokens' differ; give one of them.",
      'max_tokens',
    );
  }
  if (numPromptTokens >= maxModelLen) {
    throw new ApiError('context_length_exceeded', tooLong(numPromptTokens, maxModelLen), 'messages');
  }
  const wanted = newer ?? older;
  const rest = maxModelLen - numPromptTokens;
  if (wanted && wanted > rest) {
    throw new ApiError(
      'context_length_exceeded',
      `The context has ${maxModelLen} tokens and the prompt ${numPromptTokens}; ask for at most ${rest}, or leave it out.`,
      newer ? 'max_completion_tokens' : 'max_tokens',
    );
  }
  return wanted ?? rest;
}
