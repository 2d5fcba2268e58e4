import { randomUUID } from 'node:crypto';
import { ApiError } from '../errors.js';
import {
  cacheSaltOf,
  checkMinTokens,
  checkModel,
  checkStreamOptions,
  checkTokenId,
  readMaxTokens,
  readSampling,
  readStops,
  type ChatJob,
} from './chat-request.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

export type TextBody = components['schemas']['CompletionRequest'];

/** The tokens of a completion that says nothing about its length, as in OpenAI's API. */
const DEFAULT_MAX_TOKENS = 16;
const MAX_PROMPTS = 64;
const NO_PHASES = { thinkStart: -1, thinkEnd: -1, toolCallsBegin: -1, toolCallsEnd: -1 };

/** A prompt that is completed as it is, and what is put before its completion. */
export interface TextJob extends ChatJob {
  echo: string;
}

/** A job for each prompt; `numChoices` of each says how often it is completed. Throws ApiError. */
export function readTextRequest(body: TextBody, tenant: string, context: ApiContext): TextJob[] {
  const { prompts, maxModelLen } = context;
  checkModel(body.model, context);
  checkStreamOptions(body);
  const numLogprobs = body.logprobs ?? -1;
  if (body.echo && numLogprobs >= 0) {
    throw new ApiError(
      'unsupported_value',
      "'echo' with 'logprobs' is not supported: prompts have no log-probabilities here; remove one of them.",
      'echo',
    );
  }
  const id = `cmpl-${randomUUID().replaceAll('-', '')}`;
  const created = Math.floor(Date.now() / 1000);
  const sampling = readSampling(body, context, numLogprobs);
  const stops = readStops(body.stop);
  return readPrompts(body, context).map(({ ids, text, param }, index) => {
    if (ids.length === 0) {
      throw new ApiError('invalid_value', `'${param}' must have at least one token.`, param);
    }
    const limit = {
      max_tokens: body.max_tokens ?? Math.min(DEFAULT_MAX_TOKENS, Math.max(1, maxModelLen - ids.length)),
    };
    const own = { ...sampling, maxTokens: readMaxTokens(limit, ids.length, maxModelLen, param) };
    checkMinTokens(own);
    return {
      id,
      engineRequest: {
        requestId: `${id}-${index}`,
        promptIds: ids,
        sampling: own,
        // All of it is text: nothing is reasoning, nothing a call.
        markers: NO_PHASES,
        startPhase: 'answer',
        cacheSalt: cacheSaltOf(tenant, body.cache_salt),
        priority: body.priority ?? 0,
      },
      asked: null,
      stops,
      stopScope: 'answer',
      formatParam: null,
      isStream: body.stream === true,
      includeUsage: body.stream_options?.include_usage === true,
      hasContinuousUsage: body.stream_options?.continuous_usage_stats === true,
      returnTokenIds: body.return_token_ids === true,
      returnMetrics: false,
      isPlain: true,
      reasoningView: 'separate',
      streamsReasoning: true,
      hasOneCall: false,
      numChoices: body.n ?? 1,
      created,
      echo: body.echo ? (text ?? prompts.textOf(ids)) : '',
    };
  });
}

interface Prompt {
  ids: number[];
  /** null where it came as ids */
  text: string | null;
  param: string;
}

function readPrompts(body: TextBody, context: ApiContext): Prompt[] {
  const { prompt } = body;
  const { spec, prompts } = context;
  const ofText = (text: string, param: string): Prompt => {
    checkLength(text, param, context);
    return { ids: prompts.encodeRaw(text, body.add_special_tokens !== false), text, param };
  };
  const ofIds = (ids: readonly number[], param: string): Prompt => {
    ids.forEach((id, index) => checkTokenId(id, spec.vocabSize, `${param}[${index}]`));
    return { ids: [...ids], text: null, param };
  };
  if (typeof prompt === 'string') return [ofText(prompt, 'prompt')];
  if (prompt.every((item) => typeof item === 'number')) return [ofIds(prompt, 'prompt')];
  if (prompt.length > MAX_PROMPTS) {
    const message = `'prompt' holds ${prompt.length} prompts; send at most ${MAX_PROMPTS} in one request.`;
    throw new ApiError('invalid_value', message, 'prompt');
  }
  return prompt.map((item, index) => {
    const param = `prompt[${index}]`;
    if (typeof item === 'string') return ofText(item, param);
    if (Array.isArray(item)) return ofIds(item, param);
    const message = "'prompt' must be a text, a list of texts, a list of token ids, or a list of such lists.";
    throw new ApiError('invalid_type', message, param);
  });
}

/** What can never fit is not tokenized. */
export function checkLength(text: string, param: string, { prompts, maxModelLen }: ApiContext): void {
  const least = prompts.minTokensOf(text);
  if (least < maxModelLen) return;
  throw new ApiError(
    'context_length_exceeded',
    `'${param}' has at least ${least} tokens; the context has ${maxModelLen}, and the completion needs at least one. Shorten it.`,
    param,
  );
}
