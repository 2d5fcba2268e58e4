import type { PhaseMarkers } from '../engine/request.js';
import { ChatTemplate, type TemplateInput, type TurnPrefix } from './chat-template.js';
import { ConversationEncoder } from './conversation-encoder.js';
import { EncodeThread } from './encode-thread.js';
import { OutputParser, type StopScope, type TokenParser } from './output-parser.js';
import { TagParser } from './tag-parser.js';
import { Tokenizer } from './tokenizer.js';
import { hasDsml, toolFormatOf, type ToolFormat } from './tool-format.js';
import type { ToolMarkers } from './tool-call-parser.js';

export interface EncodedPrompt {
  ids: number[];
  /** whether the completion begins inside reasoning, read off the ids */
  startPhase: 'reasoning' | 'answer';
}

/** marked: phases are tokens; r1-zero: phases are tags in the text, and the template is that model's */
export type OutputForm = 'marked' | 'r1-zero';

/** Larger conversations are rendered and tokenized in a thread: the HTTP thread must not stand still. */
const MAX_INLINE_SIZE = 64 * 1024;

/** What one value of a conversation weighs beside its characters, which are cheaper. */
const VALUE_SIZE = 64;

/** Conversation -> prompt ids of one checkpoint, and what its vocabulary and template can do. */
export class PromptEncoder {
  readonly tokenizer: Tokenizer;
  readonly markers: PhaseMarkers;
  readonly toolMarkers: ToolMarkers;
  /** how the model writes calls; null where its vocabulary has no marks for them */
  readonly toolFormat: ToolFormat | null;
  readonly form: OutputForm;
  /** whether the chat template asks for `thinking` or `enable_thinking` */
  readonly hasThinkingSwitch: boolean;
  /** whether the chat template shows tools to the model */
  readonly rendersTools: boolean;
  readonly #encoder: ConversationEncoder;
  readonly #thread: EncodeThread;
  readonly #assistantMarker: number;

  constructor(tokenizer: Tokenizer, template: ChatTemplate, form: OutputForm = 'marked') {
    this.tokenizer = tokenizer;
    this.hasThinkingSwitch = template.hasThinkingSwitch;
    this.rendersTools = template.rendersTools;
    this.form = form;
    this.#assistantMarker = tokenizer.addedId('<｜Assistant｜>');
    this.toolFormat = toolFormatOf(tokenizer, template.source);
    const isTagged = form === 'r1-zero';
    this.markers = {
      thinkStart: isTagged ? -1 : tokenizer.addedId('<think>'),
      thinkEnd: isTagged ? -1 : tokenizer.addedId('</think>'),
      toolCallsBegin: -1,
      toolCallsEnd: -1,
      ...(isTagged ? {} : this.toolFormat?.phase),
    };
    this.toolMarkers = this.toolFormat?.markers ?? { callBegin: -1, callEnd: -1, separator: -1 };
    this.#encoder = new ConversationEncoder(tokenizer, template);
    this.#thread = new EncodeThread({
      files: tokenizer.files,
      templateSource: template.source,
      specialTokens: template.specialTokens,
    });
  }

  static read(folder: string, form: OutputForm = 'marked'): PromptEncoder {
    const tokenizer = Tokenizer.read(folder);
    const { config } = tokenizer.files;
    const template =
      form === 'r1-zero' ? ChatTemplate.r1Zero(config) : ChatTemplate.read(folder, config, hasDsml(tokenizer));
    return new PromptEncoder(tokenizer, template, form);
  }

  /** A parser for one completion's tokens; in plain text there are no tags. */
  parser(stops: readonly string[], stopScope: StopScope, isPlain = false): TokenParser {
    if (this.form === 'r1-zero' && !isPlain) return new TagParser(this.tokenizer, stops);
    return new OutputParser(this.tokenizer, this.toolMarkers, stops, stopScope);
  }

  /** A lower bound of a text's tokens, without tokenizing it. */
  minTokensOf(text: string): number {
    return Math.ceil(Buffer.byteLength(text) / this.tokenizer.maxTokenBytes);
  }

  /**
   * A prompt that is no conversation: control tokens written in it are taken for what they are, because such a prompt
   * is all that the model sees. `addsSpecial` puts the first token before it where the tokenizer says so.
   */
  encodeRaw(text: string, addsSpecial: boolean): number[] {
    const ids = this.tokenizer.encodeRendered(text);
    const { add_bos_token: addsBos, bos_token: bos } = this.tokenizer.files.config;
    const content = typeof bos === 'string' ? bos : (bos as { content?: string } | null | undefined)?.content;
    const bosId = content === undefined ? -1 : this.tokenizer.addedId(content);
    return addsSpecial && addsBos === true && bosId >= 0 && ids[0] !== bosId ? [bosId, ...ids] : ids;
  }

  /** Text of token ids, control tokens as they are written. */
  textOf(ids: readonly number[]): string {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    return ids.map((id) => decoder.decode(this.tokenizer.bytesOf(id), { stream: true })).join('') + decoder.decode();
  }

  /** Rejects with ApiError where the template refuses the conversation. */
  async encode(input: TemplateInput): Promise<EncodedPrompt> {
    const isLarge = sizeOf([input.messages, input.tools]) > MAX_INLINE_SIZE;
    const ids = isLarge ? await this.#thread.encode(input) : this.#encoder.encode(input);
    if (input.thinking === false && !this.hasThinkingSwitch) this.#closeThinking(ids);
    if (input.prefix) this.#begin(ids, input.prefix);
    return { ids, startPhase: this.startPhaseOf(ids) };
  }

  /** A model without a switch does not think where the prompt has done it already. */
  #closeThinking(ids: number[]): void {
    const { thinkStart, thinkEnd } = this.markers;
    if (thinkStart < 0 || thinkEnd < 0) return;
    if (this.startPhaseOf(ids) === 'answer') ids.push(thinkStart, ...this.tokenizer.encodeText('\n'));
    ids.push(...this.tokenizer.encodeText('\n'), thinkEnd, ...this.tokenizer.encodeText('\n\n'));
  }

  /** Appends the beginning of the assistant's turn; what it says cannot become a control token. */
  #begin(ids: number[], { reasoning, content }: TurnPrefix): void {
    const { thinkStart, thinkEnd } = this.markers;
    if (reasoning) {
      if (this.startPhaseOf(ids) === 'answer') ids.push(thinkStart);
      ids.push(...this.tokenizer.encodeText(reasoning));
    }
    if (content === '') return;
    if (this.startPhaseOf(ids) === 'reasoning') ids.push(thinkEnd);
    ids.push(...this.tokenizer.encodeText(content));
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
