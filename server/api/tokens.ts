import type { FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { cacheSaltOf, checkModel, checkTokenId, type ChatBody } from './chat-request.js';
import type { ApiContext } from './context.js';
import { readConversation } from './conversation.js';
import type { components } from './openapi.js';
import { checkLength } from './text-request.js';
import { checkThinking, readThinking } from './thinking.js';

type Schemas = components['schemas'];

/** The handler of POST /tokenize: a text as /v1/completions takes it, or messages as chat completions do. */
export async function tokenize(
  context: ApiContext,
  { body, tenant }: FastifyRequest<{ Body: Schemas['TokenizeRequest'] }>,
): Promise<Schemas['TokenizeResponse']> {
  const { prompts, maxModelLen } = context;
  if (body.model) checkModel(body.model, context);
  const ids = await idsOf(body, tenant, context);
  return {
    count: ids.length,
    max_model_len: maxModelLen,
    tokens: ids,
    token_strs: body.return_token_strs ? ids.map((id) => prompts.textOf([id])) : null,
  };
}

async function idsOf(body: Schemas['TokenizeRequest'], tenant: string, context: ApiContext): Promise<number[]> {
  const { prompt, messages } = body;
  const hasPrompt = prompt !== undefined && prompt !== null;
  const hasMessages = messages !== undefined && messages !== null;
  if (hasPrompt === hasMessages) {
    const code = hasPrompt ? 'invalid_value' : 'missing_required_parameter';
    throw new ApiError(code, "Give either 'prompt' or 'messages'.", 'prompt');
  }
  if (hasPrompt) {
    checkLength(prompt, 'prompt', context);
    return context.prompts.encodeRaw(prompt, body.add_special_tokens !== false);
  }
  const chat = { ...body, model: '', messages: messages! } as ChatBody;
  const wish = readThinking(chat);
  checkThinking(wish, chat, context);
  return (await readConversation(chat, wish, context, cacheSaltOf(tenant, null))).ids;
}

/** The handler of POST /detokenize: control tokens are shown as they are written. */
export function detokenize(
  context: ApiContext,
  { body }: FastifyRequest<{ Body: Schemas['DetokenizeRequest'] }>,
): Schemas['DetokenizeResponse'] {
  if (body.model) checkModel(body.model, context);
  body.tokens.forEach((id, index) => checkTokenId(id, context.spec.vocabSize, `tokens[${index}]`));
  return { prompt: context.prompts.textOf(body.tokens) };
}
