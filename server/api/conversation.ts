import { ApiError } from '../errors.js';
import type { TemplateMessage, TurnPrefix } from '../text/chat-template.js';
import type { EncodedPrompt } from '../text/prompt-encoder.js';
import type { ChatBody } from './chat-request.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';
import type { ThinkingWish } from './thinking.js';

type Message = components['schemas']['ChatMessage'];
type Content = Message['content'];

/** Deeper tools than this are refused: they are walked by recursion. */
export const MAX_TOOL_DEPTH = 64;

type ConversationBody = Pick<
  ChatBody,
  'messages' | 'tools' | 'tool_choice' | 'continue_final_message' | 'add_generation_prompt'
>;

/** A conversation up to an answer. */
export interface AskedConversation {
  /** names it */
  key: string;
  messages: readonly TemplateMessage[];
  tools: unknown[] | null;
}

export interface Conversation extends EncodedPrompt {
  /** what the next answer answers; null where that has been begun in the request */
  asked: AskedConversation | null;
}

/** Messages, tools and switches of a request -> prompt ids. What another salt has been answered is not known here. */
export async function readConversation(
  body: ConversationBody,
  wish: ThinkingWish,
  context: ApiContext,
  salt: string,
): Promise<Conversation> {
  const { prompts, maxModelLen } = context;
  const prefix = readPrefix(body, wish, context);
  const messages = (prefix ? body.messages.slice(0, -1) : body.messages).map(toTemplateMessage);
  const tools = body.tool_choice === 'none' || !body.tools?.length ? null : body.tools;
  if (depthOf(tools, MAX_TOOL_DEPTH + 1) > MAX_TOOL_DEPTH) {
    throw new ApiError('invalid_value', `'tools' is nested deeper than ${MAX_TOOL_DEPTH} levels; flatten it.`, 'tools');
  }
  if (tools && prompts.form === 'r1-zero') {
    throw new ApiError('unsupported_parameter', "This model knows no tools; remove 'tools'.", 'tools');
  }
  if (tools && !prompts.rendersTools && prompts.toolFormat === null) {
    const message = "This model has neither a chat template that shows tools nor marks for calls; remove 'tools'.";
    throw new ApiError('unsupported_parameter', message, 'tools');
  }
  // Long messages are counted roughly first: tokenizing what can never fit would be wasted work. Assistants' turns
  // do not count, a template may leave parts of them out.
  let leastTokens = 0;
  for (const { role, content } of messages)
    leastTokens += role === 'assistant' ? 0 : prompts.minTokensOf(content ?? '');
  if (leastTokens >= maxModelLen) {
    throw new ApiError('context_length_exceeded', tooLong(leastTokens, maxModelLen, true), 'messages');
  }
  const thinking = prefix?.reasoning ? true : wish.isEnabled;
  const recalled = context.answers.recall(messages, salt);
  const encoded = await prompts.encode({
    messages: recalled.messages,
    sampled: recalled.sampled,
    tools,
    ...(thinking === undefined ? {} : { thinking }),
    ...(prefix ? { prefix } : {}),
    // Only what generates nothing gets here with it: a completion needs the opening of its turn.
    ...(body.add_generation_prompt === false && !prefix ? { noGenerationPrompt: true } : {}),
  });
  return { ...encoded, asked: prefix ? null : { key: recalled.key, messages: recalled.messages, tools } };
}

/** The last message where the completion goes on with it: an assistant's, without tool calls. */
function readPrefix(body: ConversationBody, wish: ThinkingWish, { prompts }: ApiContext): TurnPrefix | null {
  const { messages, continue_final_message: goesOn, add_generation_prompt: opensTurn } = body;
  const at = messages.length - 1;
  const last = messages[at]!;
  messages.slice(0, -1).forEach((message, index) => {
    if (message.role !== 'assistant' || message.prefix !== true) return;
    const param = `messages[${index}].prefix`;
    throw new ApiError('invalid_value', `'${param}' is only allowed in the last message.`, param);
  });
  if (goesOn === true && opensTurn !== false) {
    const message = "'continue_final_message' needs 'add_generation_prompt': false, because no new turn is opened.";
    throw new ApiError('invalid_value', message, 'add_generation_prompt');
  }
  const isPrefix = last.role === 'assistant' && !last.tool_calls?.length && goesOn !== false && last.prefix !== false;
  if (!isPrefix) {
    if (goesOn !== true && !(last.role === 'assistant' && last.prefix === true)) return null;
    const param = goesOn === true ? 'continue_final_message' : `messages[${at}].prefix`;
    const message = `'${param}' needs a last message of the assistant without tool calls.`;
    throw new ApiError('invalid_value', message, param);
  }
  const reasoning = readReasoning(last, at);
  if (!reasoning) toTemplateMessage(last, at); // complains about a missing content
  const content = textOf(last.content) ?? '';
  if (reasoning && (prompts.markers.thinkStart < 0 || wish.isEnabled === false)) {
    const param = last.reasoning_content ? `messages[${at}].reasoning_content` : `messages[${at}].reasoning`;
    const why = wish.isEnabled === false ? 'thinking is switched off' : 'this model has no marks for reasoning';
    throw new ApiError('invalid_value', `'${param}' cannot be gone on with, because ${why}.`, param);
  }
  return { reasoning, content };
}

function toTemplateMessage(message: Message, index: number): TemplateMessage {
  const { role, name } = message;
  const content = textOf(message.content);
  const named = name === undefined ? {} : { name };
  switch (role) {
    case 'developer':
      return { role: 'system', content, ...named };
    case 'tool':
      return { role, content, tool_call_id: message.tool_call_id, ...named };
    case 'assistant': {
      const reasoning = readReasoning(message, index);
      const calls = message.tool_calls ?? [];
      if (message.content === undefined && calls.length === 0) {
        const param = `messages[${index}].content`;
        throw new ApiError(
          'missing_required_parameter',
          `'${param}' is missing; only a message with tool_calls may lack it.`,
          param,
        );
      }
      return {
        role,
        // Templates take null for "only tool calls".
        content: calls.length === 0 ? (content ?? '') : content,
        ...(reasoning ? { reasoning_content: reasoning } : {}),
        ...(calls.length ? { tool_calls: calls } : {}),
        ...named,
      };
    }
    case 'system':
    case 'user':
      return { role, content, ...named };
  }
}

function textOf(content: Content): string | null {
  if (content === undefined || content === null) return null;
  return typeof content === 'string' ? content : content.map((part) => part.text).join('\n');
}

function readReasoning(message: components['schemas']['AssistantMessage'], index: number): string | null {
  const { reasoning_content: one, reasoning: other } = message;
  if (one && other && one !== other) {
    const param = `messages[${index}].reasoning`;
    throw new ApiError('invalid_value', `'${param}' and reasoning_content differ; give one of them.`, param);
  }
  return one || other || null;
}

/** Levels of nesting, counted up to `limit`. */
export function depthOf(value: unknown, limit: number): number {
  if (typeof value !== 'object' || value === null || limit === 0) return 0;
  let deepest = 0;
  for (const item of Object.values(value)) deepest = Math.max(deepest, depthOf(item, limit - 1));
  return deepest + 1;
}

export function tooLong(numPromptTokens: number, maxModelLen: number, isLowerBound = false): string {
  const count = `${isLowerBound ? 'at least ' : ''}${numPromptTokens}`;
  return `The prompt has ${count} tokens; the context has ${maxModelLen}, and the completion needs at least one. Shorten the messages.`;
}
