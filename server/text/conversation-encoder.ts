import { ApiError } from '../errors.js';
import type { ChatTemplate, TemplateInput, TemplateMessage, TemplateToolCall } from './chat-template.js';
import { withText } from './sampled-text.js';
import type { Tokenizer } from './tokenizer.js';
import { toolFormatOf, withToolsPrompt, type ToolFormat } from './tool-format.js';

/** Characters that Unicode keeps out of interchange: the break mark is made of them. */
const FIRST_NONCHARACTER = 0xfdd0;
const NUM_NONCHARACTERS = 32;

/**
 * Conversation -> prompt ids, in this thread. Control tokens come from the template's own text alone: whatever a
 * message, a name or a tool says is broken up before rendering, and encoded as ordinary text.
 */
export class ConversationEncoder {
  readonly #tokenizer: Tokenizer;
  readonly #template: ChatTemplate;
  readonly #toolFormat: ToolFormat | null;

  constructor(tokenizer: Tokenizer, template: ChatTemplate) {
    this.#tokenizer = tokenizer;
    this.#template = template;
    this.#toolFormat = toolFormatOf(tokenizer, template.source);
  }

  /** Throws ApiError where the template refuses the conversation. */
  encode(input: TemplateInput): number[] {
    const [mark, slotMark] = marksFor(input);
    const breakIn = (text: string): string => this.#tokenizer.breakAddedTokens(text, mark);
    const tools = input.tools && (mapStrings(input.tools, breakIn) as unknown[]);
    const format = tools && !this.#template.rendersTools ? this.#toolFormat : null;
    const render = (list: TemplateMessage[]): string =>
      this.#template.render({ ...input, messages: format ? withToolsPrompt(list, tools!, format) : list, tools });
    const messages = input.messages.map((message) => this.#breakMessage(message, breakIn));
    const rendered = render(messages);
    const { sampled = [] } = input;
    if (sampled.length === 0) return this.#tokenizer.encodeRendered(rendered, mark);

    // Rendered again with a slot in place of each text that has been sampled.
    const texts: string[] = []; // [num_sampled]
    for (const [slot, place] of sampled.entries()) {
      messages[place.message] = withText(messages[place.message]!, place, (text) => {
        texts[slot] = text;
        return `${slotMark}${slot}${slotMark}`;
      });
    }
    const slots = new RegExp(`${slotMark}(\\d+)${slotMark}`);
    const withSlots = render(messages);
    const shown = withSlots.replace(new RegExp(slots, 'g'), (_, slot: string) => texts[Number(slot)] ?? '');
    // A template that changes what it shows of a text, or looks into it, gets what it makes of it.
    if (shown !== rendered) return this.#tokenizer.encodeRendered(rendered, mark);
    const ids = sampled.map((place) => place.ids);
    return this.#tokenizer.encodeRendered(withSlots, mark, { pattern: slots, ids });
  }

  #breakMessage(message: TemplateMessage, breakIn: (text: string) => string): TemplateMessage {
    const { role, content } = message;
    const own = role === 'assistant' && content !== null ? this.#template.withoutReasoning(content) : content;
    const broken = mapStrings({ ...message, content: own }, breakIn) as TemplateMessage;
    const calls = this.#template.wantsObjects ? broken.tool_calls?.map(withObject) : broken.tool_calls;
    return { ...broken, role, ...(calls ? { tool_calls: calls } : {}) };
  }
}

/** Throws ApiError where the arguments are no JSON object. */
function withObject(call: TemplateToolCall): TemplateToolCall {
  const { name, arguments: text } = call.function;
  try {
    const value: unknown = typeof text === 'string' ? JSON.parse(text.trim() === '' ? '{}' : text) : text;
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
      return { ...call, function: { name, arguments: value as Record<string, unknown> } };
    }
  } catch {
    // refused below
  }
  const message = `The arguments of the call '${call.id}' must be a JSON object: this model is shown them one by one.`;
  throw new ApiError('invalid_value', message, 'messages');
}

/** Two strings that are nowhere in the conversation, and of which neither has to do with the other. */
function marksFor(input: TemplateInput): [breakMark: string, slotMark: string] {
  const text = JSON.stringify([input.messages, input.tools]);
  const marks: string[] = [];
  for (let i = 0; i < NUM_NONCHARACTERS && marks.length < 2; i++) {
    const mark = String.fromCharCode(FIRST_NONCHARACTER + i);
    if (!text.includes(mark)) marks.push(mark);
  }
  for (let half = marks.length; half < 2; half++) {
    let mark = String.fromCharCode(FIRST_NONCHARACTER + half);
    while (text.includes(mark)) {
      mark += String.fromCharCode(FIRST_NONCHARACTER + 2 + Math.floor(Math.random() * (NUM_NONCHARACTERS - 2)));
    }
    marks.push(mark);
  }
  return [marks[0]!, marks[1]!];
}

/** Keys too: the names of a tool's parameters are a client's words. */
function mapStrings(value: unknown, change: (text: string) => string): unknown {
  if (typeof value === 'string') return change(value);
  if (Array.isArray(value)) return value.map((item) => mapStrings(item, change));
  if (typeof value === 'object' && value !== null) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [change(key), mapStrings(item, change)]));
  }
  return value;
}
