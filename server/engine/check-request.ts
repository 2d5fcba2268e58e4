import { ApiError } from '../errors.js';
import type { EngineRequest, SamplingParams, ThinkingLimits } from './request.js';

/** What an engine can take: known as soon as it is ready. */
export interface RequestLimits {
  vocabSize: number;
  /** most tokens of one sequence, prompt and completion: the smaller of the model's positions and the cache */
  maxContext: number;
  /** most requests running and waiting at once */
  maxOpen: number;
}

type Field = keyof SamplingParams;

/** The name under which a client knows each parameter. */
const PARAM_NAMES: Record<Field, string> = {
  temperature: 'temperature',
  topP: 'top_p',
  topK: 'top_k',
  minP: 'min_p',
  seed: 'seed',
  presencePenalty: 'presence_penalty',
  frequencyPenalty: 'frequency_penalty',
  repetitionPenalty: 'repetition_penalty',
  logitBias: 'logit_bias',
  stopTokenIds: 'stop_token_ids',
  minTokens: 'min_tokens',
  maxTokens: 'max_tokens',
  numLogprobs: 'top_logprobs',
};

/** Throws ApiError where a request can never be served. Whatever passes cannot harm the step loop. */
export function checkRequest(request: EngineRequest, numOpen: number, limits: RequestLimits): void {
  const { promptIds, sampling } = request;
  if (promptIds.length === 0)
    throw new ApiError('invalid_value', 'The prompt must have at least one token.', 'messages');
  if (promptIds.length >= limits.maxContext) {
    throw new ApiError(
      'context_length_exceeded',
      `The prompt has ${promptIds.length} tokens; with room for one token of completion at most ${limits.maxContext - 1} fit into the context of ${limits.maxContext}. Shorten the messages.`,
      'messages',
    );
  }
  for (const id of promptIds) checkTokenId(id, limits.vocabSize, 'messages');
  for (const id of request.resumedIds ?? []) checkTokenId(id, limits.vocabSize, 'messages');
  checkSampling(sampling, limits.vocabSize);
  if (request.thinking !== undefined) checkThinking(request.thinking, request.markers.thinkEnd, limits.vocabSize);
  if (!Number.isSafeInteger(request.priority ?? 0)) {
    throw new ApiError('invalid_value', "'priority' must be a whole number.", 'priority');
  }
  if (numOpen >= limits.maxOpen) {
    throw new ApiError('queue_full', `${numOpen} requests are running and waiting already; try again later.`);
  }
}

function checkSampling(sampling: SamplingParams, vocabSize: number): void {
  checkRange(sampling, 'temperature', 0, Infinity);
  checkRange(sampling, 'topP', Number.MIN_VALUE, 1);
  checkCount(sampling, 'topK', 0);
  checkRange(sampling, 'minP', 0, 1);
  checkRange(sampling, 'presencePenalty', -2, 2);
  checkRange(sampling, 'frequencyPenalty', -2, 2);
  checkRange(sampling, 'repetitionPenalty', Number.MIN_VALUE, Infinity);
  checkCount(sampling, 'maxTokens', 1);
  checkCount(sampling, 'minTokens', 0);
  checkCount(sampling, 'numLogprobs', -1);
  if (sampling.minTokens > sampling.maxTokens) {
    fail('minTokens', `is ${sampling.minTokens}; it must be at most the ${sampling.maxTokens} tokens of completion`);
  }
  if (sampling.numLogprobs > vocabSize) {
    fail('numLogprobs', `is ${sampling.numLogprobs}; the vocabulary has ${vocabSize} tokens`);
  }
  if (typeof sampling.seed !== 'bigint' || sampling.seed < 0n || sampling.seed >= 2n ** 64n) {
    fail('seed', `is ${sampling.seed}; it must be a whole number of 64 bits`);
  }
  for (const [id, bias] of sampling.logitBias) {
    checkTokenId(id, vocabSize, PARAM_NAMES.logitBias);
    if (typeof bias !== 'number' || !(Math.fround(bias) < Infinity)) {
      fail('logitBias', `of token ${id} is ${bias}; it must be a number`);
    }
  }
  for (const id of sampling.stopTokenIds) checkTokenId(id, vocabSize, PARAM_NAMES.stopTokenIds);
}

function checkThinking(thinking: ThinkingLimits, thinkEnd: number, vocabSize: number): void {
  const { budget, endIds, extendIds = [], minAnswerTokens, loopTokens } = thinking;
  for (const id of [...endIds, ...extendIds]) checkTokenId(id, vocabSize, 'thinking');
  const isCount = (value: number) => Number.isInteger(value) && value >= 0;
  const hasLimit = budget !== Infinity || minAnswerTokens > 0 || loopTokens > 0;
  const isEnded = !hasLimit || (thinkEnd >= 0 && endIds.at(-1) === thinkEnd);
  if (isEnded && (budget === Infinity || isCount(budget)) && isCount(minAnswerTokens) && isCount(loopTokens)) return;
  throw new ApiError(
    'invalid_value',
    "'thinking' must have whole limits and end with the marker of its end.",
    'thinking',
  );
}

/** The runner takes float32: a value must still be in range when it is rounded to that. */
function checkRange(sampling: SamplingParams, field: Field, min: number, max: number): void {
  const value = sampling[field];
  const rounded = typeof value === 'number' ? Math.fround(value) : NaN;
  if (Number.isFinite(rounded) && rounded >= min && rounded <= max) return;
  const low = min === Number.MIN_VALUE ? 'above 0' : `at least ${min}`;
  fail(field, `is ${String(value)}; it must be ${low}${max === Infinity ? '' : ` and at most ${max}`}`);
}

function checkCount(sampling: SamplingParams, field: Field, min: number): void {
  const value = sampling[field];
  if (typeof value === 'number' && Number.isInteger(value) && value >= min && value < 2 ** 31) return;
  fail(field, `is ${String(value)}; it must be a whole number of at least ${min}`);
}

function checkTokenId(id: number, vocabSize: number, param: string): void {
  if (Number.isInteger(id) && id >= 0 && id < vocabSize) return;
  throw new ApiError(
    'token_out_of_vocabulary',
    `Token id ${id} in '${param}' is not in the vocabulary; ids go from 0 to ${vocabSize - 1}.`,
    param,
  );
}

function fail(field: Field, problem: string): never {
  throw new ApiError('invalid_value', `'${PARAM_NAMES[field]}' ${problem}.`, PARAM_NAMES[field]);
}
