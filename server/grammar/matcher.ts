import { LRUCache } from 'lru-cache';
import { Automaton, type AutomatonState } from './automaton.js';
import { Distances } from './distances.js';
import type { Grammar } from './grammar.js';
import { Network } from './network.js';
import type { TokenTree } from './vocabulary.js';

/** New automaton states that one mask may need; a grammar that needs more cannot be followed in time. */
const MAX_NEW_STATES = 50_000;
const MAX_MASKS = 2048;
const MAX_MASK_BYTES = 16 * 2 ** 20;

export interface NextTokens {
  /** bit id % 32 of word id / 32; stop tokens are not in it */
  words: Int32Array; // [ceil(vocab_size / 32)]
  isEmpty: boolean;
  /** with so many tokens left, these and what they lead to can all be completed */
  mostToEnd: number;
}

/** One grammar over one vocabulary: automaton and masks, shared by all sequences that follow it. */
export class CompiledGrammar {
  readonly #network: Network;
  readonly #tree: TokenTree;
  readonly #distances: Distances;
  readonly #masks: LRUCache<AutomatonState, NextTokens>;
  readonly #path: (AutomatonState | null)[]; // [max_depth + 1]
  #automaton: Automaton;
  /** changes when all states of before are void */
  generation = 0;

  /** Throws RangeError where the grammar is too large, left-recursive or too ambiguous. */
  constructor(grammar: Grammar, tree: TokenTree) {
    this.#network = new Network(grammar);
    this.#tree = tree;
    this.#distances = new Distances(this.#network, tree);
    this.#automaton = new Automaton(this.#network, this.#distances);
    const numBytes = 4 * Math.ceil(tree.vocabSize / 32);
    const most = Math.floor(MAX_MASK_BYTES / numBytes);
    this.#masks = new LRUCache({ max: Math.min(Math.max(most, 16), MAX_MASKS) });
    this.#path = new Array<AutomatonState | null>(tree.maxDepth + 1).fill(null); // [max_depth + 1]
  }

  get start(): AutomatonState {
    return this.#automaton.start;
  }

  /** Drops what has been learnt where that has become too much; matchers then replay their tokens. */
  trim(): void {
    if (!this.#automaton.isFull) return;
    this.#automaton = new Automaton(this.#network, this.#distances);
    this.#masks.clear();
    this.generation++;
  }

  /** The state behind a token; null where the grammar does not allow it. */
  accept(state: AutomatonState, tokenId: number): AutomatonState | null {
    const bytes = this.#tree.table.bytes[tokenId];
    if (bytes === undefined) {
      const control = this.#network.controls.find(([id]) => id === tokenId);
      return control ? this.#automaton.step(state, control[1]) : null;
    }
    let at: AutomatonState | null = state;
    for (const byte of bytes) {
      if (at === null) return null;
      at = this.#automaton.step(at, this.#network.classOf(byte));
    }
    return at;
  }

  /** The state behind tokens from the start on; null where the grammar does not allow them. */
  read(tokens: readonly number[]): AutomatonState | null {
    let state: AutomatonState | null = this.start;
    for (const token of tokens) state = state && this.accept(state, token);
    return state;
  }

  /**
   * Which tokens may come next where `numLeft` are left, this one included: all that the grammar allows, or where the
   * text could not be completed behind some of them, the others. A text that so few tokens may not complete is not held
   * to them.
   */
  nextTokens(state: AutomatonState, numLeft: number): NextTokens {
    let all = this.#masks.get(state);
    if (all === undefined) this.#masks.set(state, (all = this.#walk(state, Infinity)));
    return numLeft >= all.mostToEnd || numLeft < state.numToEnd ? all : this.#walk(state, numLeft);
  }

  #walk(state: AutomatonState, numLeft: number): NextTokens {
    const tree = this.#tree;
    const automaton = this.#automaton;
    const network = this.#network;
    const path = this.#path;
    const words = new Int32Array(Math.ceil(tree.vocabSize / 32)); // [ceil(vocab_size / 32)]
    const mostStates = automaton.numStates + MAX_NEW_STATES;
    let isEmpty = true;
    let mostToEnd = 0;
    const allow = (id: number, numToEnd: number): void => {
      if (numToEnd >= numLeft && numLeft !== Infinity) return;
      words[id >> 5]! |= 1 << (id & 31);
      isEmpty = false;
      mostToEnd = Math.max(mostToEnd, numToEnd + 1);
    };
    path[0] = state;
    for (let node = 0; node < tree.numNodes;) {
      const depth = tree.depthOf[node]!;
      const reached = automaton.step(path[depth - 1]!, network.classOf(tree.byteOf[node]!));
      if (reached === null) {
        node = tree.endOf[node]!;
        continue;
      }
      path[depth] = reached;
      const end = tree.tokensStart[node + 1]!;
      for (let at = tree.tokensStart[node]!; at < end; at++) allow(tree.tokenIds[at]!, reached.numToEnd);
      if (automaton.numStates > mostStates) throw new RangeError('the grammar is too ambiguous to be followed');
      node++;
    }
    path.fill(null);
    for (const [tokenId, symbolClass] of network.controls) {
      const reached = automaton.step(state, symbolClass);
      if (reached !== null) allow(tokenId, reached.numToEnd);
    }
    return { words, isEmpty, mostToEnd };
  }
}

export interface MatcherMask {
  /** which tokens may come next, stop tokens included; null: the grammar is complete and nothing can follow */
  words: Int32Array | null; // [ceil(vocab_size / 32)]
  /** so many tokens surely complete the text; Infinity where no number is sure */
  numToEnd: number;
  /** with so many tokens left the mask is the same as with any more */
  mostToEnd: number;
}

/** One sequence's way through a grammar. */
export class Matcher {
  readonly #compiled: CompiledGrammar;
  readonly #stopIds: readonly number[]; // control tokens alone
  readonly #tokens: number[] = []; // [num_accepted]
  #state: AutomatonState;
  #generation: number;

  constructor(compiled: CompiledGrammar, stopIds: readonly number[]) {
    this.#compiled = compiled;
    this.#stopIds = stopIds;
    this.#generation = compiled.generation;
    this.#state = compiled.start;
  }

  /** Throws where the grammar does not allow a token; the sampler took it in spite of its mask. */
  accept(tokens: readonly number[]): void {
    this.#revive();
    for (const token of tokens) {
      const next = this.#compiled.accept(this.#state, token);
      if (next === null) throw new RangeError(`token ${token} does not fit the grammar`);
      this.#state = next;
      this.#tokens.push(token);
    }
  }

  /** `numLeft` tokens may come, the next one included. Where none may, it tells whether any could have followed. */
  mask(numLeft: number): MatcherMask {
    this.#revive();
    const { accepts, numToEnd } = this.#state;
    const { words, isEmpty, mostToEnd } = this.#compiled.nextTokens(this.#state, numLeft === 0 ? Infinity : numLeft);
    if (!accepts) {
      if (isEmpty) throw new RangeError('no token of the vocabulary goes on with the grammar');
      return { words, numToEnd, mostToEnd };
    }
    if (isEmpty) return { words: null, numToEnd, mostToEnd };
    const withStops = words.slice();
    for (const id of this.#stopIds) withStops[id >> 5]! |= 1 << (id & 31);
    return { words: withStops, numToEnd, mostToEnd };
  }

  #revive(): void {
    this.#compiled.trim();
    if (this.#generation === this.#compiled.generation) return;
    this.#generation = this.#compiled.generation;
    this.#state = this.#compiled.read(this.#tokens)!;
  }
}
