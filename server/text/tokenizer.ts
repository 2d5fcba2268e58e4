import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HubTokenizer } from '@huggingface/tokenizers';
import { StartupError } from '../errors.js';
import { BYTE_OF_CHARACTER } from './byte-level.js';

/** A token of tokenizer.json's `added_tokens`: matched in text before anything else, never made by merges. */
export interface AddedToken {
  id: number;
  content: string;
  special: boolean;
  lstrip: boolean;
  rstrip: boolean;
  single_word: boolean;
}

/** tokenizer.json and tokenizer_config.json as parsed; plain values, so a worker thread can be given them. */
export interface TokenizerFiles {
  tokenizer: Record<string, unknown> & { added_tokens?: AddedToken[]; model: { vocab: Record<string, number> } };
  config: Record<string, unknown>;
}

/** Types of the package do not resolve under NodeNext: its declarations import without extensions. */
interface TextEncoderOfHub {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
}

/** Places in a rendered text where tokens stand that are known. */
export interface TokenSlots {
  /** matches a slot; its one group is the slot's number */
  pattern: RegExp;
  ids: readonly (readonly number[])[]; // [num_slots][num_tokens]
}

const NO_BYTES = new Uint8Array(0); // [0]

/**
 * Text <-> token ids of one checkpoint. Added tokens (control tokens among them) come from the template's own
 * text only: encodeText() never makes one, encodeRendered() makes those that no break mark interrupts.
 */
export class Tokenizer {
  readonly files: TokenizerFiles;
  /** 1 + the greatest id with a content */
  readonly vocabSize: number;
  /** most bytes one token that is not an added token stands for */
  readonly maxTokenBytes: number;
  readonly #hub: TextEncoderOfHub;
  readonly #added = new Map<string, AddedToken>();
  readonly #addedById = new Map<number, AddedToken>();
  readonly #addedPattern: RegExp | null;
  /** every proper prefix of an added token's content */
  readonly #addedPrefixes = new Set<string>();
  readonly #longestAdded: number;
  readonly #contents: (string | undefined)[]; // [vocabSize]
  readonly #bytes: (Uint8Array | undefined)[]; // [vocabSize] filled on first use

  constructor(files: TokenizerFiles) {
    this.files = files;
    const { tokenizer, config } = files;
    checkByteLevel(tokenizer);
    const added = tokenizer.added_tokens ?? [];
    const Hub = HubTokenizer as new (tokenizer: object, config: object) => TextEncoderOfHub;
    this.#hub = new Hub({ ...tokenizer, added_tokens: [], post_processor: null }, config);
    this.#contents = [];
    let maxTokenBytes = 1;
    for (const [content, id] of Object.entries(tokenizer.model.vocab)) {
      this.#contents[id] = content;
      if (content.length > maxTokenBytes) maxTokenBytes = content.length;
    }
    this.maxTokenBytes = maxTokenBytes;
    let longest = 0;
    for (const token of added) {
      if (token.single_word) {
        throw new StartupError(
          `tokenizer.json: added token ${JSON.stringify(token.content)} has single_word true, which is not supported.`,
        );
      }
      this.#added.set(token.content, token);
      this.#addedById.set(token.id, token);
      this.#contents[token.id] = token.content;
      for (let end = 1; end < token.content.length; end++) this.#addedPrefixes.add(token.content.slice(0, end));
      longest = Math.max(longest, token.content.length);
    }
    this.#longestAdded = longest;
    const longestFirst = [...this.#added.keys()].filter((c) => c).sort((a, b) => b.length - a.length);
    this.#addedPattern = longestFirst.length ? new RegExp(longestFirst.map(escapePattern).join('|'), 'g') : null;
    this.vocabSize = this.#contents.length;
    this.#bytes = new Array<Uint8Array | undefined>(this.vocabSize);
  }

  static read(folder: string): Tokenizer {
    const tokenizer = readJson(folder, 'tokenizer.json');
    const config = readJson(folder, 'tokenizer_config.json');
    const model = tokenizer.model as { vocab?: unknown } | undefined;
    if (typeof model?.vocab !== 'object' || model.vocab === null) {
      throw new StartupError(
        `${join(folder, 'tokenizer.json')}: model.vocab is missing; the file is no BPE tokenizer.`,
      );
    }
    try {
      return new Tokenizer({ tokenizer, config } as TokenizerFiles);
    } catch (error) {
      if (error instanceof StartupError) throw error;
      throw new StartupError(`${join(folder, 'tokenizer.json')} cannot be used: ${(error as Error).message}`);
    }
  }

  /** id of an added token's content, -1 where there is none */
  addedId(content: string): number {
    return this.#added.get(content)?.id ?? -1;
  }

  /** Ordinary text: whatever it looks like, no added token comes out. */
  encodeText(text: string): number[] {
    return text === '' ? [] : this.#hub.encode(text, { add_special_tokens: false }).ids;
  }

  /**
   * Puts `mark` into every added token written in `text` and after an ending that the next text could complete to
   * one, so that encodeRendered() takes the whole for ordinary text.
   */
  breakAddedTokens(text: string, mark: string): string {
    if (!this.#addedPattern || text === '') return text;
    const broken = text.replace(this.#addedPattern, (content) => content[0] + mark + content.slice(1));
    for (let length = Math.min(this.#longestAdded - 1, text.length); length > 0; length--) {
      if (this.#addedPrefixes.has(text.slice(-length))) return broken + mark;
    }
    return broken;
  }

  /**
   * A rendered template: added tokens where they stand unbroken, ordinary text (marks taken out) between them, and in
   * slots the tokens that are known to belong there.
   */
  encodeRendered(rendered: string, mark = '', slots: TokenSlots | null = null): number[] {
    const ids: number[] = [];
    let start = 0;
    let trimNext = false;
    const ordinary = (end: number, trimEnd: boolean): void => {
      let text = rendered.slice(start, end);
      if (mark !== '') text = text.replaceAll(mark, '');
      if (trimNext) text = text.trimStart();
      if (trimEnd) text = text.trimEnd();
      if (slots === null) return this.#pushText(ids, text);
      // Texts and the numbers of slots by turns.
      for (const [index, part] of text.split(slots.pattern).entries()) {
        if (index % 2 === 0) this.#pushText(ids, part);
        else for (const id of slots.ids[Number(part)]!) ids.push(id);
      }
    };
    for (const match of this.#addedPattern ? rendered.matchAll(this.#addedPattern) : []) {
      const token = this.#added.get(match[0])!;
      ordinary(match.index, token.lstrip);
      ids.push(token.id);
      start = match.index + match[0].length;
      trimNext = token.rstrip;
    }
    ordinary(rendered.length, false);
    return ids;
  }

  #pushText(ids: number[], text: string): void {
    for (const id of this.encodeText(text)) ids.push(id);
  }

  /** Bytes that a token stands for; none for ids beyond the tokenizer's vocabulary (padding rows of the model). */
  bytesOf(id: number): Uint8Array {
    const known = this.#bytes[id];
    if (known) return known;
    const content = this.#contents[id];
    if (content === undefined) return NO_BYTES;
    const bytes = this.#addedById.has(id) ? new TextEncoder().encode(content) : bytesOfByteLevel(content);
    this.#bytes[id] = bytes;
    return bytes;
  }

  /** control tokens: never shown to a client */
  isSpecial(id: number): boolean {
    return this.#addedById.get(id)?.special ?? false;
  }
}

function bytesOfByteLevel(content: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of content) {
    const byte = BYTE_OF_CHARACTER.get(character);
    if (byte === undefined) return new TextEncoder().encode(content);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

function escapePattern(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&');
}

function readJson(folder: string, name: string): Record<string, unknown> {
  const path = join(folder, name);
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code === 'ENOENT' ? 'is missing' : (error as Error).message;
    throw new StartupError(`${path} ${reason}; serving needs the checkpoint's tokenizer files.`);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new StartupError(`${path} is not valid JSON: ${(error as Error).message}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new StartupError(`${path} must hold a JSON object.`);
  }
  return value as Record<string, unknown>;
}

interface Typed {
  type?: string;
  pretokenizers?: Typed[];
  decoders?: Typed[];
}

function checkByteLevel(tokenizer: Record<string, unknown>): void {
  const has = (part: Typed | null | undefined): boolean =>
    part?.type === 'ByteLevel' || (part?.pretokenizers ?? part?.decoders ?? []).some(has);
  const model = tokenizer.model as Typed;
  if (model.type !== undefined && model.type !== 'BPE') {
    throw new StartupError(`tokenizer.json: model type '${model.type}' is not supported; only byte-level BPE is.`);
  }
  for (const key of ['pre_tokenizer', 'decoder'] as const) {
    if (!has(tokenizer[key] as Typed | null)) {
      throw new StartupError(`tokenizer.json: its ${key} is not ByteLevel; only byte-level BPE is supported.`);
    }
  }
}
