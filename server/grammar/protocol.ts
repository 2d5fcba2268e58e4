import type { Grammar } from './grammar.js';
import type { MatcherMask } from './matcher.js';

/** What the grammar thread is started with. */
export interface GrammarThreadData {
  /** path of tokenizer.json */
  tokenizer: string;
  vocabSize: number;
}

/**
 * To the thread, which answers each but 'close' with one GrammarReply, in order. `numLeft` is how many tokens may follow
 * those told so far.
 */
export type GrammarCommand =
  /** the mask behind the tokens that a sequence has already; grammars of the same key are compiled once */
  | {
      type: 'open';
      handle: number;
      key: string;
      grammar: Grammar;
      stopIds: number[];
      tokens: number[];
      numLeft: number;
    }
  | { type: 'accept'; handle: number; tokens: number[]; numLeft: number }
  | { type: 'close'; handle: number };

export type GrammarReply =
  /** the thread has read its vocabulary; sent once, without being asked */
  | { type: 'ready' }
  | { type: 'mask'; handle: number; mask: MatcherMask }
  | { type: 'failed'; handle: number; message: string };
