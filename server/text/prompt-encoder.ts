import type { PhaseMarkers } from '../engine/request.js';
import { ChatTemplate, type TemplateInput } from './chat-template.js';
import { ConversationEncoder } from './conversation-encoder.js';
import { EncodeThread } from './encode-thread.js';
import { Tokenizer } from './tokenizer.js';
import type { ToolMarkers } from './tool-call-parser.js';

export interface EncodedPrompt {
  ids: number[];
  /** whether the completion begins inside reasoning, read off the ids */
  startPhase: 'reasoning' | 'answer';
}

/** Larger conversations are rendered and tokenized in a thread: the HTTP thread must not stand still. */
const MAX_INLINE_SIZE = 64 * 1024;

/** What one value of a conversation weighs beside its characters, which are cheaper. */
const VALUE_SIZE = 64;

/** Conversation -> prompt ids of one checkpoint, and what its vocabulary and template can do. */
export class PromptEncoder {
  readonly tokenizer: Tokenizer;
  readonly markers: PhaseMarkers;
  readonly toolMarkers: ToolMarkers;
  /** whether the chat template asks for `thinking` or `enable_thinking` */
  readonly hasThinkingSwitch: boolean;
  /** whether the chat template shows tools to the model */
  readonly rendersTools: boolean;
  /** whether the template writes a call's arguments in a fence, as V3's and R1's do */
  readonly fencesToolCalls: boolean;
  readonly #encoder: ConversationEncoder;
  readonly #thread: EncodeThread;
  readonly #assistantMarker: number;

  constructor(tokenizer: Tokenizer, template: ChatTemplate) {
    this.tokenizer = tokenizer;
    this.hasThinkingSwitch = template.hasThinkingSwitch;
    this.rendersTools = template.rendersTools;
    this.fencesToolCalls = template.source.includes('```json');
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
    this.#encoder = new ConversationEncoder(tokenizer, template);
    this.#thread = new EncodeThread({
      files: tokenizer.files,
      templateSource: template.source,
      specialTokens: template.specialTokens,
    });
  }

  static read(folder: string): PromptEncoder {
    const tokenizer = Tokenizer.read(folder);
    return new PromptEncoder(tokenizer, ChatTemplate.read(folder, tokenizer.files.config));
  }

  /** A lower bound of a text's tokens, without tokenizing it. */
  minTokensOf(text: string): number {
    return Math.ceil(Buffer.byteLength(text) / this.tokenizer.maxTokenBytes);
  }

  /** Rejects with ApiError where the template refuses the conversation. */
  async encode(input: TemplateInput): Promise<EncodedPrompt> {
    const isLarge = sizeOf([input.messages, input.tools]) > MAX_INLINE_SIZE;
    const ids = isLarge ? await this.#thread.encode(input) : this.#encoder.encode(input);
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
    await this.#thread.close();
  }
}

function sizeOf(value: unknown): number {
  if (typeof value === 'string') return value.length;
  if (typeof value !== 'object' || value === null) return 0;
  let size = VALUE_SIZE;
  for (const [key, item] of Object.entries(value)) size += key.length + sizeOf(item);
  return size;
}
