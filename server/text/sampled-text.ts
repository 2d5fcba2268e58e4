import type { TemplateMessage } from './chat-template.js';

/** Where a text of an assistant's turn came from: the tokens that it was sampled as. */
export interface SampledText {
  /** index of the message */
  message: number;
  field: 'content' | 'reasoning_content' | 'name' | 'arguments';
  /** index of the call, of its name and arguments */
  call: number;
  ids: readonly number[]; // [num_tokens]
}

/** Puts `change(text, field, call)` in place of one text of a message. */
export function withText(
  message: TemplateMessage,
  { field, call }: Pick<SampledText, 'field' | 'call'>,
  change: (text: string) => string,
): TemplateMessage {
  if (field === 'content') return { ...message, content: change(message.content ?? '') };
  if (field === 'reasoning_content') return { ...message, reasoning_content: change(message.reasoning_content ?? '') };
  const calls = message.tool_calls?.map((one, index) => {
    const text = one.function[field];
    if (index !== call || typeof text !== 'string') return one;
    return { ...one, function: { ...one.function, [field]: change(text) } };
  });
  return { ...message, ...(calls ? { tool_calls: calls } : {}) };
}
