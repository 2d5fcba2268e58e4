import { EncodeWorker } from './encode-worker-client.js';
import { ChatTemplate, type TemplateInput, type TemplateMessage } from './chat-template.js';
import { Tokenizer } from './tokenizer.js';
import type { ToolMarkers } from './tool-call-parser.js';

/** Token ids that switch phases; -1 where the vocabulary has no such token. */
export interface ThinkMarkers {
  thinkStart: number;
  thinkEnd: number;
  toolCallsBegin: number;
  toolCallsEnd: number;
}

export interface EncodedPrompt {
  ids: number[];
  /** whether the completion begins inside reasoning, read off the ids */
  startPhase: 'reasoning' | 'answer';
}

/** Texts longer than this are tokenized in a worker thread: the HTTP thread must not stand still. */
const MAX_INLINE_CHARACTERS = 64 * 1024;

/** Characters that Unicode keeps out of interchange: the break mark is made of them. */
const FIRST_NONCHARACTER = 0xfdd0;
const NUM_NONCHARACTERS = 32;

/** Conversation -> prompt ids of one checkpoint. Nothing that a message says can become a control token. */
export class PromptEncoder {
  readonly tokenizer: Tokenizer;
  readonly markers: ThinkMarkers;
  readonly toolMarkers: ToolMarkers;
  readonly #template: ChatTemplate;
  readonly #assistantMarker: number;
  readonly #worker: EncodeWorker;

  constructor(tokenizer: Tokenizer, template: ChatTemplate) {
    this.tokenizer = tokenizer;
    this.#template = template;
    this.#assistantMarker = tokenizer.addedId('<｜Assistant｜>');
    const tools = [
      tokenizer.addedId('<｜tool▁calls▁begin｜>'),
      tokenizer.addedId('<｜tool▁calls▁end｜>'),
      tokenizer.addedId('<｜tool▁call▁begin｜>'),
      tokenizer.addedId('<｜tool▁call▁end｜>'),
      tokenizer.addedId('<｜tool▁sep｜>'),
    ];
    const [toolCallsBegin, toolCallsEnd, callBegin, callEnd, separator] = (
      tools.includes(-1) ? [-1, -1, -1, -1, -1] : tools
    ) as [number, number, number, number, number];
    this.markers = {
      thinkStart: tokenizer.addedId('<think>'),
      thinkEnd: tokenizer.addedId('</think>'),
      toolCallsBegin,
      toolCallsEnd,
    };
    this.toolMarkers = { callBegin, callEnd, separator };
    this.#worker = new EncodeWorker(tokenizer.files);
  }

  static read(folder: string): PromptEncoder {
    const tokenizer = Tokenizer.read(folder);
    return new PromptEncoder(tokenizer, ChatTemplate.read(folder, tokenizer.files.config));
  }

  /** whether the chat template asks for `thinking` or `enable_thinking` */
  get hasThinkingSwitch(): boolean {
    return this.#template.hasThinkingSwitch;
  }

  /** A lower bound of a text's tokens, without tokenizing it. */
  minTokensOf(text: string): number {
    return Math.ceil(Buffer.byteLength(text) / this.tokenizer.maxTokenBytes);
  }

  /** Rejects with ApiError where the template refuses the conversation. */
  async encode(input: TemplateInput): Promise<EncodedPrompt> {
    const mark = breakMarkFor(input);
    const breakIn = (text: string): string => this.tokenizer.breakAddedTokens(text, mark);
    const messages = input.messages.map((message) => this.#breakMessage(message, breakIn));
    const tools = input.tools && (mapStrings(input.tools, breakIn) as unknown[]);
    const rendered = this.#template.render({ ...input, messages, tools });
    const ids =
      rendered.length > MAX_INLINE_CHARACTERS
        ? await this.#worker.encodeRendered(rendered, mark)
        : this.tokenizer.encodeRendered(rendered, mark);
    return { ids, startPhase: this.startPhaseOf(ids) };
  }

  /** The last think marker after the last assistant marker says where the completion begins. */
  startPhaseOf(ids: readonly number[]): 'reasoning' | 'answer' {
    for (let i = ids.length - 1; i >= 0; i--) {
      const id = ids[i]!;
      if (id === this.markers.thinkStart) return 'reasoning';
      if (id === this.markers.thinkEnd || id === this.#assistantMarker) return 'answer';
    }
    return 'answer';
  }

  async close(): Promise<void> {
    await this.#worker.close();
  }

  #breakMessage(message: TemplateMessage, breakIn: (text: string) => string): TemplateMessage {
    const { role, content } = message;
    const own = role === 'assistant' && content !== null ? this.#template.withoutReasoning(content) : content;
    const broken = mapStrings({ ...message, content: own }, breakIn) as TemplateMessage;
    return { ...broken, role };
  }
}

/** A string that is nowhere in the conversation. */
function breakMarkFor(input: TemplateInput): string {
  const text = JSON.stringify([input.messages, input.tools]);
  for (let i = 0; i < NUM_NONCHARACTERS; i++) {
    const mark = String.fromCharCode(FIRST_NONCHARACTER + i);
    if (!text.includes(mark)) return mark;
  }
  let mark = String.fromCharCode(FIRST_NONCHARACTER);
  while (text.includes(mark))
    mark += String.fromCharCode(FIRST_NONCHARACTER + Math.floor(Math.random() * NUM_NONCHARACTERS));
  return mark;
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
