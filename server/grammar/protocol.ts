import type { Grammar } from './grammar.js';

/** What the grammar thread is started with. */
export interface GrammarThreadData {
  /** path of tokenizer.json */
  tokenizer: string;
  vocabSize: number;
}

/** To the thread, which answers each but 'close' with one GrammarReply, in order. */
export type GrammarCommand =
  /** the mask behind the tokens that a sequence has already; grammars of the same key are compiled once */
  | { type: 'open'; handle: number; key: string; grammar: Grammar; stopIds: number[]; tokens: number[] }
  | { type: 'accept'; handle: number; tokens: number[] }
  | { type: 'close'; handle: number };

export type GrammarReply =
  /** the thread has read its vocabulary; sent once, without being asked */
  | { type: 'ready' }
  /** words null: the grammar is complete, and nothing can follow */
  | { type: 'mask'; handle: number; words: Int32Array | null }
  | { type: 'failed'; handle: number; message: string };
