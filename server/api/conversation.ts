import { ApiError } from '../errors.js';
import type { TemplateMessage } from '../text/chat-template.js';
import type { EncodedPrompt } from '../text/prompt-encoder.js';
import type { ChatBody } from './chat-request.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

type Message = components['schemas']['ChatMessage'];
type Content = Message['content'];

/** Deeper tools than this are refused: they are walked by recursion. */
export const MAX_TOOL_DEPTH = 64;

/** Messages, tools and switches of a request -> prompt ids. */
export async function readConversation(body: ChatBody, context: ApiContext): Promise<EncodedPrompt> {
  const { prompts, maxModelLen } = context;
  const messages = body.messages.map(toTemplateMessage);
  const tools = body.tool_choice === 'none' || !body.tools?.length ? null : body.tools;
  if (depthOf(tools, MAX_TOOL_DEPTH + 1) > MAX_TOOL_DEPTH) {
    throw new ApiError('invalid_value', `'tools' is nested deeper than ${MAX_TOOL_DEPTH} levels; flatten it.`, 'tools');
  }
  if (tools && !prompts.rendersTools) {
    const message = "This model's chat template does not show tools to the model; remove 'tools'.";
    throw new ApiError('unsupported_parameter', message, 'tools');
  }
  const thinking = readThinking(body);
  checkThinking(thinking, context);
  // Long messages are counted roughly first: tokenizing what can never fit would be wasted work. Assistants' turns
  // do not count, a template may leave parts of them out.
  let leastTokens = 0;
  for (const { role, content } of messages)
    leastTokens += role === 'assistant' ? 0 : prompts.minTokensOf(content ?? '');
  if (leastTokens >= maxModelLen) {
    throw new ApiError('context_length_exceeded', tooLong(leastTokens, maxModelLen, true), 'messages');
  }
  return prompts.encode({ messages, tools, thinking });
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

interface Switch {
  param: string;
  value: boolean;
}

function readThinking({ thinking, chat_template_kwargs: kwargs }: ChatBody): boolean | undefined {
  const given: Switch[] = [];
  if (thinking) given.push({ param: 'thinking', value: thinking.type === 'enabled' });
  for (const key of ['thinking', 'enable_thinking'] as const) {
    const value = kwargs?.[key];
    if (value !== undefined) given.push({ param: `chat_template_kwargs.${key}`, value });
  }
  const conflict = given.find(({ value }) => value !== given[0]!.value);
  if (conflict) {
    const message = `'${given[0]!.param}' and '${conflict.param}' contradict each other; give one of them.`;
    throw new ApiError('invalid_value', message, conflict.param);
  }
  return given[0]?.value;
}

/** A switch that the model does not have must not look as if it worked. */
function checkThinking(thinking: boolean | undefined, { prompts }: ApiContext): void {
  if (thinking === undefined || prompts.hasThinkingSwitch) return;
  const canThink = prompts.markers.thinkEnd >= 0;
  if (thinking === canThink) return;
  const is = canThink ? 'always reasons' : 'does not reason';
  throw new ApiError(
    'unsupported_value',
    `This model ${is}, and its chat template has no switch for it; remove 'thinking'.`,
    'thinking',
  );
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
