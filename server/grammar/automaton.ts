import type { Distances } from './distances.js';
import type { Network } from './network.js';

/** One way to go on: a state with edges, and what is called when its rule ends. */
interface Config {
  state: number;
  stack: Stack;
}

/** Where to go on after the rule that runs now; null at the bottom. */
interface Stack {
  id: number;
  after: number;
  below: Stack | null;
  /** tokens from its end to the end of the text */
  numToEnd: number;
}

/** All ways to go on after some text, which is why it is deterministic. */
export interface AutomatonState {
  readonly id: number;
  readonly configs: readonly Config[];
  /** the text is complete as it is */
  readonly accepts: boolean;
  /** so many tokens surely complete the text; Infinity where no number is sure */
  readonly numToEnd: number;
  /** by symbol class; undefined: not asked for yet */
  readonly next: (AutomatonState | undefined)[]; // [num_classes]
}

const BOTTOM: Stack = { id: 0, after: -1, below: null, numToEnd: 0 };
const DEAD: AutomatonState = { id: -1, configs: [], accepts: false, numToEnd: Infinity, next: [] };

/** Ways to go on at one place; a grammar with more is ambiguous beyond use. */
const MAX_CONFIGS = 4096;
/** most deeply nested calls */
const MAX_DEPTH = 2048;
/** States kept; a matcher's owner replaces an automaton that has more. */
const MAX_AUTOMATON_STATES = 20_000;
const STATE_BITS = 2 ** 21;

/** The network's runs over symbols, made deterministic as far as they are asked for. */
export class Automaton {
  readonly network: Network;
  readonly start: AutomatonState;
  readonly #distances: Distances;
  readonly #states = new Map<string, AutomatonState>();
  readonly #stacks = new Map<number, Stack>();

  constructor(network: Network, distances: Distances) {
    this.network = network;
    this.#distances = distances;
    this.start = this.#intern([{ state: network.start, stack: BOTTOM }]);
  }

  /** Whether it has grown so large that it should be dropped. */
  get isFull(): boolean {
    return this.#states.size > MAX_AUTOMATON_STATES || this.#stacks.size > STATE_BITS / 2;
  }

  get numStates(): number {
    return this.#states.size;
  }

  /** The state behind a symbol; null where nothing goes on. Throws where the grammar is too ambiguous. */
  step(state: AutomatonState, symbolClass: number): AutomatonState | null {
    const known = state.next[symbolClass] ?? this.#advance(state, symbolClass);
    return known === DEAD ? null : known;
  }

  #advance(state: AutomatonState, symbolClass: number): AutomatonState {
    const reached: Config[] = [];
    for (const { state: id, stack } of state.configs) {
      for (const [first, last, target] of this.network.state(id).edges) {
        if (first <= symbolClass && symbolClass <= last) reached.push({ state: target, stack });
      }
    }
    const next = reached.length === 0 ? DEAD : this.#intern(reached);
    state.next[symbolClass] = next;
    return next;
  }

  /** Follows jumps, calls and ends until only states with edges are left. */
  #intern(reached: Config[]): AutomatonState {
    const { network } = this;
    const seen = new Set<number>();
    const configs: Config[] = [];
    const keys: number[] = [];
    let accepts = false;
    const open = reached;
    while (open.length > 0) {
      const { state: id, stack } = open.pop()!;
      const key = stack.id * STATE_BITS + id;
      if (seen.has(key)) continue;
      seen.add(key);
      if (seen.size > MAX_CONFIGS) throw new RangeError('the grammar is too ambiguous, or too deeply nested');
      const { edges, jumps, calls, isEnd } = network.state(id);
      if (edges.length > 0) {
        configs.push({ state: id, stack });
        keys.push(key);
      }
      for (const jump of jumps) open.push({ state: jump, stack });
      for (const [start, after] of calls) open.push({ state: start, stack: this.#push(stack, after) });
      if (!isEnd) continue;
      if (stack.below === null) accepts = true;
      else open.push({ state: stack.after, stack: stack.below });
    }
    const name = `${accepts ? 'a' : ''}${keys.sort((a, b) => a - b).join()}`;
    let state = this.#states.get(name);
    if (state === undefined) {
      const next = new Array<AutomatonState | undefined>(network.numClasses).fill(undefined); // [num_classes]
      state = { id: this.#states.size, configs, accepts, numToEnd: accepts ? 0 : this.#numToEnd(configs), next };
      this.#states.set(name, state);
    }
    return state;
  }

  #numToEnd(configs: readonly Config[]): number {
    return configs.reduce(
      (least, { state, stack }) => Math.min(least, this.#distances.of(state) + stack.numToEnd),
      Infinity,
    );
  }

  #push(below: Stack, after: number): Stack {
    if (this.network.isPlainEnd(after)) return below;
    const key = below.id * STATE_BITS + after;
    const known = this.#stacks.get(key);
    if (known) return known;
    if (depthOf(below) >= MAX_DEPTH) throw new RangeError('the output is too deeply nested');
    const numToEnd = this.#distances.of(after) + below.numToEnd;
    const stack: Stack = { id: this.#stacks.size + 1, after, below, numToEnd };
    this.#stacks.set(key, stack);
    return stack;
  }
}

function depthOf(stack: Stack): number {
  let depth = 0;
  for (let at: Stack | null = stack; at !== null; at = at.below) depth++;
  return depth;
}
